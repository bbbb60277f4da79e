"""Laws of models in folders of Hugging Face's format: what is read, refused and written."""

import json
import math
import pickle
import random
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import TINY
from pretrained import (
    CHARACTERS,
    DECODERS,
    SMALL,
    TOKENIZERS,
    T,
    assert_close,
    assert_equal,
    change_config,
    change_weights,
    every_decoder,
    read_theirs,
    refusal,
    save_theirs,
    their_config,
)
from safetensors.torch import load_file
from strategies import scramble
from torch.nn.functional import cross_entropy
from transformers import AutoConfig

from nanolm.batches import evaluation_batches
from nanolm.hub.families import FAMILIES
from nanolm.hub.models import CONFIG, GENERATION, WEIGHTS, export_model, load_pretrained
from nanolm.hub.tokenizers import write_tokenizer
from nanolm.layers import ModelConfig
from nanolm.loss import NO_TARGET
from nanolm.model import GPT
from nanolm.runs.load import load_model
from nanolm.sampling import beam_search
from nanolm.text.data import open_dataset


def test_the_command_exports_a_run_that_then_writes_the_same_texts(tiny_run, run_main):
    """And an export can be exported again."""
    for source, target in [(tiny_run, "there"), ("there", "again")]:
        code, out, err = run_main("nanolm/runs/export", source, target)
        assert (code, err) == (0, "")
        assert out.endswith(f"written to {target} as Qwen3ForCausalLM\n")
    flags = ("--num_samples=3", "--max_new_tokens=40", "--device=cpu", "--start=1 little")
    code, out, _ = run_main("sample", "--out_dir=out/tiny", *flags)
    assert run_main("sample", "--init_from=there", *flags)[:2] == (code, out)
    assert code == 0
    assert_equal(load_model("again")[:2], load_model(tiny_run)[:2])


# ------------------------------------------------------------------------------------------
# What no family has, or no model here


MODERN = {"norm": "rms", "position": "rotary", "mlp": "swiglu"}
FOREIGN_HERE = [
    ({"position": "sinusoidal"}, "position='sinusoidal'"),
    ({"position": "rotary"}, "position='rotary'"),  # with layer norms
    ({"head_size": 4}, "head_size=4"),
    ({"n_kv_head": 1}, "n_kv_head=1"),
    ({**MODERN, "qk_norm": True, "mlp": "relu2"}, "qk_norm=True"),
    ({**MODERN, "mlp": "gelu"}, "mlp='gelu'"),
    ({**MODERN, "n_embd": 7, "head_size": 4}, "n_embd=7"),
    ({**MODERN, "qk_norm": True, "bias": True}, "blocks.0.mlp.up.bias is not 0"),
]
FOREIGN_THERE = [
    ("llama", {"model_type": "mistral"}, "'mistral'"),
    ("llama", {"model_type": None}, "model_type None"),
    ("gpt2", {"activation_function": "gelu"}, "'gelu'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx True"),
    ("llama", {"hidden_act": "gelu"}, "'gelu'"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "'llama3'"),
    ("llama", {"rope_scaling": {"type": "linear"}, "rope_parameters": None}, "'linear'"),
    ("llama", {"rope_scaling": {"type": "yarn"}}, "'yarn'"),  # beside rope_parameters
    ("gpt2", {"is_causal": False}, "is_causal False"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ("qwen3", {"use_sliding_window": True}, "use_sliding_window True"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ("llama", {"quantization_config": {"bits": 4}}, "bits"),
]


@pytest.mark.parametrize(("keys", "reason"), FOREIGN_HERE)
def test_a_model_of_no_family_is_refused_by_name_and_leaves_nothing_behind(keys, reason, tmp_path):
    tiny = {"vocab_size": CHARACTERS.vocab_size, "block_size": 7, "n_layer": 1, "n_head": 2}
    model = scramble(GPT(ModelConfig(**tiny | {"n_embd": 12} | keys)), 1)
    assert reason in refusal(export_model, model, CHARACTERS, tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("family", "keys", "reason"), FOREIGN_THERE)
def test_a_foreign_model_is_refused_by_the_value_that_is_foreign(family, keys, reason, tmp_path):
    save_theirs(tmp_path, their_config(family))
    found = refusal(load_model, change_config(tmp_path, **keys))
    assert CONFIG in found
    assert reason in found


@pytest.mark.parametrize(
    ("architecture", "what"),
    [
        ("RobertaForMaskedLM", "an encoder"),
        ("LlamaForSequenceClassification", "a classifier"),
        ("RobertaForTokenClassification", "a classifier"),
        ("T5ForConditionalGeneration", "an encoder-decoder"),
        ("BartForConditionalGeneration", "an encoder-decoder"),
    ],
)
def test_what_is_of_no_family_is_refused_as_what_it_is(architecture, what, tmp_path):
    """And not for the tokenizer that its folder lacks: it could not be used with one."""
    family = re.match("[A-Z][a-z]*5?", architecture)[0].lower()
    config = AutoConfig.for_model(family, architectures=[architecture])
    config.save_pretrained(tmp_path)
    assert f"{architecture} is {what}" in refusal(load_model, tmp_path)


# ------------------------------------------------------------------------------------------
# Hostile folders


@pytest.fixture
def llama(tmp_path) -> Path:
    """The folder of a sound model of transformers."""
    return save_theirs(tmp_path / "llama", their_config("llama"))


ABSURD = {
    "num_hidden_layers": [10**9, 10**30, -1, 0, 1.5, "a\nb", None, [], {}, True],
    "hidden_size": [2**40, 2**62, 0],
    "intermediate_size": [2**62, 18],
    "max_position_embeddings": [10**15, 0],
    "vocab_size": [2**40, 10**18, 5],
    "num_attention_heads": [10**12, 5, 0],
    "num_key_value_heads": [3, 10**12],
    "head_dim": [2**61, 3],
    "rms_norm_eps": [math.nan, 0, None, "x"],
    "rope_parameters": [5, [1], {"rope_theta": 0}, {"rope_theta": math.inf}],
    "layer_types": [5, [[]], [1, "a"]],
    "nanolm": [5, {"bias": "x"}],
    "attention_bias": [True],
    "tie_word_embeddings": [True, "x"],
}


@pytest.mark.parametrize("key", ABSURD)
def test_a_config_that_does_not_fit_the_weights_is_refused(key, llama):
    before = (llama / CONFIG).read_bytes()
    for value in ABSURD[key]:
        (llama / CONFIG).write_bytes(before)
        assert str(llama) in refusal(load_model, change_config(llama, **{key: value}))


def test_a_config_that_is_none_is_refused(llama):
    for text in ("", "{", "[]", "5", "[" * 10**5, '{"model_type": "llama"}', "\xff\xfe"):
        (llama / CONFIG).write_text(text, encoding="latin-1")
        assert str(llama / CONFIG) in refusal(load_model, llama)
    (llama / CONFIG).unlink()
    assert CONFIG in refusal(load_model, llama)


HEAD, NORM = "lm_head.weight", "model.norm.weight"
TENSORS = {
    "another shape": (NORM, torch.ones(11), "norm.weight has the shape"),
    "more axes": (NORM, torch.ones(12, 1), "norm.weight has the shape"),
    "one more": ("model.norm.bias", torch.ones(12), "there is a model.norm.bias"),
    "a layer more": ("model.layers.2.mlp.up_proj.weight", torch.ones(17, 12), "a model.layers.2"),
    "not a number": (NORM, torch.full((12,), math.nan), "norm.weight holds"),
    "infinite": (HEAD, torch.full((SMALL["vocab_size"], 12), -math.inf), "lm_head.weight holds"),
    "beyond float32": (NORM, torch.full((12,), 1e300, dtype=torch.float64), "norm.weight holds"),
    "one twice": ("norm.weight", torch.ones(12), "some stand there twice"),
    "one less": (NORM, None, "no norm.weight"),
}


@pytest.mark.parametrize(("name", "tensor", "reason"), TENSORS.values(), ids=TENSORS)
def test_weights_that_are_not_those_of_the_config_are_refused_by_name(name, tensor, reason, llama):
    def change(tensors: dict) -> None:
        tensors[name] = tensor
        if tensor is None:
            del tensors[name]

    change_weights(llama, change)
    assert reason in refusal(load_model, llama)


def test_a_head_that_is_not_the_embedding_to_which_it_is_tied_is_refused(tmp_path):
    save_theirs(tmp_path, their_config("llama", tie_word_embeddings=True))
    loaded = load_pretrained(tmp_path)
    embedding = load_file(tmp_path / WEIGHTS)["model.embed_tokens.weight"]
    change_weights(tmp_path, lambda tensors: tensors.update({HEAD: embedding.clone()}))
    assert_equal(load_pretrained(tmp_path), loaded)
    change_weights(tmp_path, lambda tensors: tensors.update({HEAD: embedding + 1}))
    assert f"{HEAD} is not the embedding" in refusal(load_model, tmp_path)


def test_a_tokenizer_with_more_tokens_than_its_model_is_refused(llama):
    write_tokenizer(TOKENIZERS["bpe"], llama, ModelConfig(block_size=T))
    assert re.search(r"has 263 tokens, .* only \d\d$", refusal(load_model, llama))


def lying(length: int | None = None, /, **entries: tuple) -> bytes:
    """A safetensors file of 48 bytes of numbers, whose header says this."""
    keys = ("dtype", "shape", "data_offsets")
    described = {name: dict(zip(keys, entry, strict=True)) for name, entry in entries.items()}
    header = json.dumps(described).encode()
    return (length or len(header)).to_bytes(8, "little") + header + bytes(48)


LIES = [
    lying(2**60),
    b"\xff" * 64,
    lying(5),
    lying(a=("F32", [2**38], [0, 2**40])),  # beyond the file
    lying(a=("F32", [12], [0, 48]), b=("F32", [12], [0, 48])),  # overlapping
    lying(a=("F32", [12], [48, 0])),
    lying(a=("F32", [2**62, 4], [0, 48])),
    lying(a=("F99", [12], [0, 48])),
    lying(a=("F32", [-12], [0, 48])),
]


def test_a_damaged_or_lying_file_is_refused_by_name(llama):
    whole = (llama / WEIGHTS).read_bytes()
    lengths = [0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1]
    for content in [*LIES, *(whole[:length] for length in lengths), whole + b"0"]:
        (llama / WEIGHTS).write_bytes(content)
        assert "model.safetensors is damaged" in refusal(load_model, llama)
    (llama / WEIGHTS).unlink()
    (llama / WEIGHTS).mkdir()
    assert "model.safetensors is damaged" in refusal(load_model, llama)


def test_parts_that_are_missing_or_left_from_another_model_are_refused(tmp_path):
    save_theirs(tmp_path, their_config("llama"), max_shard_size="1KB")
    first, second, *_ = sorted(tmp_path.glob("model-*.safetensors"))
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(first.read_bytes())
    assert "some stand there twice" in refusal(load_model, tmp_path)
    first.unlink()
    second.unlink()
    assert "there is no " in refusal(load_model, tmp_path)


class Trap:
    """Its unpickling writes a file."""

    def __reduce__(self):
        return Path.write_text, (Path("sprung").absolute(), "")


def test_a_pickle_is_named_and_never_opened(llama, workplace):
    (llama / WEIGHTS).unlink()
    assert refusal(load_model, llama).endswith("there is no 'model.safetensors'")
    (llama / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    assert "pytorch_model.bin: a pickle can run code" in refusal(load_model, llama)
    assert not Path("sprung").exists()


# ------------------------------------------------------------------------------------------
# Folders that an export leaves alone


def content_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_export_goes_to_a_folder_of_its_own(tiny_run):
    """So it mixes with no run, no dataset, no text, and replaces no other model."""
    model, tokenizer, *_ = load_model(tiny_run)
    Path("empty").mkdir()
    export_model(model, tokenizer, "empty")
    before = content_of(Path())
    for folder in (tiny_run, "data/tiny", "data", "empty"):
        assert f"{folder} is there already" in refusal(export_model, model, tokenizer, folder)
    for folder in ("text.txt", "text.txt/below"):
        with pytest.raises(NotADirectoryError, match=folder):
            export_model(model, tokenizer, folder)
    assert content_of(Path()) == before


def test_what_a_killed_export_has_left_is_no_obstacle(tiny_run):
    Path("there/.partial").mkdir(parents=True)
    Path("there/.partial/model.safetensors").write_bytes(b"half")
    export_model(*load_model(tiny_run)[:2], "there")
    assert load_model("there")[0].config == load_model(tiny_run)[0].config
    assert not Path("there/.partial").exists()


def test_an_export_onto_a_full_disk_says_what_it_needs_and_leaves_nothing(tiny_run):
    model, tokenizer, *_ = load_model(tiny_run)
    resource = pytest.importorskip("resource")  # Windows has none
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
    try:
        found = refusal(export_model, model, tokenizer, "there")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert re.search(r"cannot write model.safetensors .*; it needs [\d,]+ bytes", found)
    assert not Path("there").exists()


def test_an_export_that_fails_leaves_nothing(tiny_run, monkeypatch):
    model, tokenizer, *_ = load_model(tiny_run)
    before = content_of(Path())
    monkeypatch.setattr("nanolm.hub.models.write_tokenizer", Mock(side_effect=OSError("full")))
    with pytest.raises(OSError, match="full"):
        export_model(model, tokenizer, "there/below")
    assert content_of(Path()) == before
    assert not Path("there").exists()


def test_others_may_read_an_export_as_they_may_any_new_file(tiny_run):
    export_model(*load_model(tiny_run)[:2], "there")
    modes = {path.stat().st_mode for path in Path("there").iterdir()}
    assert modes == {Path("text.txt").stat().st_mode}


def test_a_decoder_is_exported_as_one_that_draws(tiny_run):
    """transformers' server took the likeliest token at every temperature, with every seed."""
    export_model(*load_model(tiny_run)[:2], "there")
    assert json.loads(Path("there", GENERATION).read_text())["do_sample"] is True


# ------------------------------------------------------------------------------------------
# Finetuning


@every_decoder
def test_the_end_of_a_text_is_learned_there_as_here(name, tmp_path):
    """It was called padding, too, whose embedding gets no gradient there."""
    tokenizer, shape = TOKENIZERS["bpe"], FAMILIES[name].shape
    keys = {key: value for key, value in SMALL.items() if key in FAMILIES[name].keys}
    keys |= {"vocab_size": tokenizer.vocab_size, "tie_embeddings": False}
    model = scramble(GPT(ModelConfig(**shape | keys)), 1, scale=0.1)
    export_model(model, tokenizer, tmp_path / "there")
    theirs = read_theirs(tmp_path / "there")
    ids = [*tokenizer.encode("a wolf"), tokenizer.end_of_text, *tokenizer.encode("a fox")]
    ids = torch.tensor([ids])
    theirs(ids, labels=ids).loss.backward()
    model(ids[:, :-1], ids[:, 1:])[1].backward()
    found = theirs.get_input_embeddings().weight.grad
    assert model.tokens.weight.grad[tokenizer.end_of_text].any()
    assert_close(found, model.tokens.weight.grad)


@pytest.mark.parametrize("n", [20, pytest.param(200, marks=pytest.mark.long)])
def test_beams_find_what_they_find_there(n, tmp_path):
    """Of random models, with few and many beams and tokens that end a text."""
    draw = random.Random(0)
    for number in range(n):
        config = their_config(DECODERS[number % len(DECODERS)])
        folder = save_theirs(tmp_path / f"{number}", config, seed=number, scale=0.3)
        theirs, ours = read_theirs(folder), load_pretrained(folder)[0].eval()
        V, room = ours.config.vocab_size, ours.config.block_size // 2
        ids = torch.tensor([draw.choices(range(V), k=draw.randint(1, room))])
        stop = draw.sample(range(V), k=draw.choice([1, 2, V // 4]))
        keys = {"num_beams": draw.randint(1, 5), "max_new_tokens": draw.randint(1, room)}
        keys["length_penalty"] = draw.choice([-0.5, 0.0, 0.5, 1.0, 2.0])
        found = beam_search(ours, ids, stop_ids=stop, **keys).tolist()
        options = {"eos_token_id": stop, "pad_token_id": stop[0], "attention_mask": ids >= 0}
        options |= {"do_sample": False, "early_stopping": False}
        text = theirs.generate(ids, **keys, **options)[0, ids.shape[1] :].tolist()
        assert found == text[: len(found)]
        assert set(text[len(found) :]) <= {stop[0]}


@torch.no_grad()
def validation_loss(theirs: torch.nn.Module, dataset: str, block_size: int) -> float:
    """The loss of a model of transformers on a dataset's whole validation text."""
    tokens, total = open_dataset(dataset).val, 0.0
    for batch in evaluation_batches(tokens, batch_size=2, block_size=block_size):
        ids, targets = map(torch.from_numpy, batch.values())
        logits = theirs(ids).logits.flatten(0, 1)
        total += cross_entropy(logits, targets.flatten(), ignore_index=NO_TARGET, reduction="sum")
    return total.item() / (len(tokens) - 1)


@pytest.mark.parametrize(
    ("family", "asked", "length", "said"),
    [("gpt2", 8, 8, f"cut to 8 tokens, of {T}"), ("qwen3", 37, T, f"block_size={T}")],
    ids=["shorter", "longer"],
)
def test_a_run_starts_where_the_pretrained_model_stands_and_lowers_its_loss(
    family, asked, length, said, tiny_run, run_main, monkeypatch
):
    """The shape is the folder's, but for dropout and a shorter context."""
    # drawing takes longer
    monkeypatch.setattr("nanolm.runs.pictures.draw_losses", lambda *_, **__: False)
    theirs = save_theirs(Path("theirs"), their_config(family))
    assert run_main("prepare", "new", "--input=text.txt", "--tokenizer=theirs")[0] == 0
    flags = ["--dataset=new", "--init_from=theirs", "--out_dir=out/new", f"--block_size={asked}"]
    flags += ["--eval_iters=0", "--max_iters=20", "--eval_interval=20", "--dropout=0.1"]
    code, out, err = run_main("train", *TINY, *flags, "--learning_rate=0.01")
    assert (code, err) == (0, "")
    assert said in out
    lines = map(json.loads, Path("out/new/metrics.jsonl").read_text().splitlines())
    first, last = (line["val_loss"] for line in lines if "val_loss" in line)
    wanted = validation_loss(read_theirs(theirs), "new", length)
    assert first == pytest.approx(wanted, rel=1e-5)
    assert last < first - 0.1
    config = load_model("out/new")[0].config
    assert (config.block_size, config.dropout, config.n_embd) == (length, 0.1, 12)
