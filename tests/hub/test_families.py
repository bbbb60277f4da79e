"""Laws of the families: the same model on both sides, with transformers itself as the oracle."""

import logging
import re
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from conftest import ROOT, TEXT
from hypothesis import given, settings
from hypothesis import strategies as st
from pretrained import (
    CHARACTERS,
    LABELS,
    MODELS,
    SMALL,
    TOKENIZERS,
    T,
    assert_close,
    assert_equal,
    assert_same_logits,
    assert_same_model,
    change_config,
    change_weights,
    every_model,
    expressible,
    family_of,
    read_theirs,
    save_theirs,
    their_config,
)
from strategies import head_counts, random_tokens, scramble, seeds
from transformers import AutoTokenizer

from nanolm.hub.families import BERT, FAMILIES, config_json, labels_of
from nanolm.hub.models import WEIGHTS, export_model, load_pretrained
from nanolm.layers import ModelConfig
from nanolm.model import Transformer, build_model
from nanolm.runs.settings import TrainConfig
from nanolm.system.config import load_config
from nanolm.text.tokenizer import Tokenizer, framed


def counts(few: dict[str, int]) -> pytest.MarkDecorator:
    """How many examples of each family a law is shown, with a hundred in the long run."""
    many = [pytest.param(name, 100, marks=pytest.mark.long) for name in few]
    return pytest.mark.parametrize(("name", "count"), [*few.items(), *many])


# ------------------------------------------------------------------------------------------
# In


@st.composite
def their_configs(draw, name: str):
    """A small one of any shape."""
    n_head, n_kv_head = draw(head_counts)
    choices = {
        "block_size": [T, 37],
        "n_layer": [1, 2, 3],
        "n_kv_head": [n_head, n_kv_head],
        "n_embd": [n_head * 12, n_head * 20],  # norms of fewer channels magnify rounding
        "n_hidden": [17, 23],
        "head_size": [4, 6],
        "norm_eps": [1e-5, 0.1],  # 0.1: a forgotten one is seen
        "rope_theta": [10.0, 100.0],
        "tie_embeddings": [False, True],
    }
    ours = {key: draw(st.sampled_from(values)) for key, values in choices.items()}
    biases = {key: draw(st.booleans()) for key in ("attention_bias", "mlp_bias")}
    return their_config(name, SMALL | ours | {"n_head": n_head}, **biases)


@counts(dict.fromkeys(MODELS, 6) | {"gpt2": 12})
def test_a_model_of_transformers_is_the_same_model_here(name, count, tmp_path):
    @settings(max_examples=count)
    @given(their_configs(name), seeds)
    def law(config, seed):
        model, tokenizer = load_pretrained(save_theirs(tmp_path, config, seed=seed))
        assert tokenizer == CHARACTERS
        assert_same_model(model, read_theirs(tmp_path))

    law()


@every_model
def test_at_the_end_of_a_long_context_a_model_is_the_same_here(name, tmp_path):
    """The rounding of rotary frequencies grows with the position: once to 7e-4 of the logits.

    Sums over so many tokens alone make differences of 1e-5.
    """
    long = {"block_size": 4096, "head_size": 128, "n_embd": 128, "n_head": 1, "rope_theta": 1e6}
    config = their_config(name, SMALL | long | {"n_layer": 1})
    model, _ = load_pretrained(save_theirs(tmp_path, config, scale=0.3))
    assert_same_logits(model, read_theirs(tmp_path), length=4096, tolerance=1e-4)


@every_model
def test_the_older_names_of_weights_mean_the_same(name, tmp_path):
    """The hub's GPT-2 has no prefix, and holds masks that are no weights; others hold angles.

    BERT's norms are spelled otherwise there, and come with the heads of its training.
    """
    loaded = load_pretrained(save_theirs(tmp_path, their_config(name)))

    def respell(tensors: dict) -> None:
        for own in list(tensors):
            tensors[own.removeprefix(family_of(name).prefix)] = tensors.pop(own)
        if name == "gpt2":
            tensors["h.0.attn.bias"] = torch.ones(1, 1, T, T).tril().bool()
            tensors["h.1.attn.masked_bias"] = torch.tensor(-1e4)
        elif family_of(name) == BERT:
            for own in [own for own in tensors if "LayerNorm" in own]:
                older = own.replace("weight", "gamma").replace("bias", "beta")
                tensors[older] = tensors.pop(own)
            tensors["embeddings.position_ids"] = torch.arange(T)
            tensors["cls.seq_relationship.weight"] = torch.ones(2, 12)
        else:
            tensors["layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(2)

    assert_equal(load_pretrained(change_weights(tmp_path, respell)), loaded)


@pytest.mark.filterwarnings("ignore:`rope_scaling`:FutureWarning")  # transformers' own
@every_model
def test_missing_keys_and_older_ones_mean_what_they_mean_to_transformers(name, tmp_path):
    """Qwen3's files may even leave out how many heads have keys, and then there are 32."""
    missing = {"rope_parameters", "layer_types", *family_of(name).defaults}
    missing |= family_of(name).required.keys()
    missing -= {"classifier_pooling"}  # without it, EuroBERT has another one
    heads = 64 if name == "qwen3" else 2
    spelled = {key: own for key, own in family_of(name).keys.items() if own not in missing}
    ours = {key: value for key, value in SMALL.items() if key in spelled} | {"n_head": heads}
    save_theirs(tmp_path, their_config(name, ours))
    change_config(tmp_path, without=missing)
    assert_same_model(load_pretrained(tmp_path)[0], read_theirs(tmp_path))
    change_config(tmp_path, rope_theta=10.0, rope_scaling=None)
    assert_same_model(load_pretrained(tmp_path)[0], read_theirs(tmp_path))


def test_labels_have_the_order_of_their_numbers():
    assert labels_of({"id2label": {"1": "good", "0": "bad"}}) == ("bad", "good")


@pytest.mark.parametrize(("name", "dtype"), [("gpt2", torch.float16), ("llama", torch.bfloat16)])
def test_weights_of_16_bits_and_in_several_files_are_read_in_float32(name, dtype, tmp_path):
    save_theirs(tmp_path, their_config(name), dtype=dtype, max_shard_size="1KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 5
    assert not (tmp_path / WEIGHTS).exists()
    model, _ = load_pretrained(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert_same_model(model, read_theirs(tmp_path))


@pytest.mark.parametrize("tied", [False, True])
def test_tokens_that_only_pad_a_model_are_left_out(tied, tmp_path):
    config = their_config("qwen3", SMALL | {"vocab_size": 64, "tie_embeddings": tied})
    model, tokenizer = load_pretrained(save_theirs(tmp_path, config))
    assert model.config.vocab_size == tokenizer.vocab_size == CHARACTERS.vocab_size
    ids = random_tokens(model.config, 5)
    with torch.no_grad():
        assert_close(model(ids)[0], read_theirs(tmp_path)(ids).logits[..., : tokenizer.vocab_size])


# ------------------------------------------------------------------------------------------
# Out


def assert_survives_export(model: Transformer, tokenizer: Tokenizer, place: Path) -> None:
    """transformers computes the same, and nothing changes on the way back, from its files too."""
    export_model(model, tokenizer, place / "ours")
    theirs, text = read_theirs(place / "ours"), AutoTokenizer.from_pretrained(place / "ours")
    assert_same_logits(model, theirs, length=model.config.block_size)
    ids = tokenizer.encode(TEXT[:T])
    if model.config.labels or model.config.n_encoder_layer:
        ids = framed(tokenizer, ids)
    assert text(TEXT[:T])["input_ids"] == ids
    ends = [text.eos_token_id, theirs.config.eos_token_id]
    ends += [theirs.generation_config.eos_token_id] if model.config.causal else []
    assert set(ends) == {tokenizer.end_of_text}
    assert_equal(load_pretrained(place / "ours"), (model, tokenizer))
    theirs.save_pretrained(place / "theirs")
    text.save_pretrained(place / "theirs")
    assert_equal(load_pretrained(place / "theirs"), (model, tokenizer))


@counts(dict.fromkeys(MODELS, 5))
def test_an_exported_model_is_the_same_in_transformers_and_back_again(name, count):
    @settings(max_examples=count)
    @given(expressible(name), st.sampled_from(sorted(TOKENIZERS)), seeds)
    def law(config, tokenizer, seed):
        tokenizer = TOKENIZERS[tokenizer]
        model = build_model(replace(config, vocab_size=tokenizer.vocab_size)).eval()
        scramble(model, seed, scale=0.1)
        for own, parameter in model.named_parameters():
            if name == "qwen3" and re.search(r"\.mlp\..*\.bias", own):  # it has none
                torch.nn.init.zeros_(parameter)
        with TemporaryDirectory() as place:
            assert_survives_export(model, tokenizer, Path(place))

    law()


def test_other_programs_find_the_keys_that_they_read():
    """Older and newer ones; llama.cpp wants GPT-2's context under its oldest name."""
    gpt2 = config_json(FAMILIES["gpt2"], ModelConfig(block_size=T))
    assert gpt2["n_ctx"] == gpt2["n_positions"] == T
    keys = FAMILIES["llama"].shape | {"rope_theta": 100.0}
    llama = config_json(FAMILIES["llama"], ModelConfig(**keys))
    assert llama["rope_theta"] == llama["rope_parameters"]["rope_theta"] == 100
    assert llama["rope_parameters"]["rope_type"] == "default"


TRAINING = [path for path in sorted(ROOT.glob("config/*.py")) if "eval_" not in path.name]


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_what_every_config_trains_can_be_exported(path, tmp_path, caplog, monkeypatch):
    """And transformers has nothing to remark. No weight is trained yet: biases of 0 are kept."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer, config = TOKENIZERS["bpe"], load_config(TrainConfig, [str(path)])
    tiny = {"vocab_size": tokenizer.vocab_size, "n_kv_head": 2, "head_size": 6}
    config = replace(config, **SMALL | tiny)
    head = {"classification": "text", "tagging": "words"}.get(config.task, "tokens")
    labels = () if head == "tokens" else LABELS
    causal = config.task in ("causal", "completion", "seq2seq")
    config = replace(config, head=head, labels=labels, causal=causal)
    model = build_model(config.model_config()).eval()
    assert_survives_export(model, tokenizer, tmp_path)
    assert not caplog.records
