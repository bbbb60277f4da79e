"""Small random models of transformers in folders, and how they compare with ours."""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import TEXT
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from strategies import model_configs, random_tokens, scramble
from torch import Tensor

from nanolm.hub.families import FAMILIES, Family
from nanolm.hub.models import CONFIG, WEIGHTS
from nanolm.hub.tokenizers import write_tokenizer
from nanolm.layers import ModelConfig
from nanolm.model import EncoderDecoder, Transformer
from nanolm.sampling import beam_search, generate
from nanolm.text.tokenizer import BPETokenizer, CharTokenizer, Tokenizer

transformers.logging.disable_progress_bar()

CHARACTERS = CharTokenizer.train([TEXT])
TOKENIZERS = {"char": CHARACTERS, "bpe": BPETokenizer.train([TEXT], 263)}
T = 31  # the shortest context: room for a prompt and 20 tokens
SMALL = {"block_size": T, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 12, "n_hidden": 17}
SMALL |= {"vocab_size": CHARACTERS.vocab_size, "head_size": 4}
OF_PAIRS = {"n_encoder_layer": 1, "start_id": 2, "scale_embeddings": True, "mlp": "relu"}
# A family and what its models end in, by a name of both.
MODELS = {
    name if head == "tokens" else f"{name}-{head}": (name, head)
    for name, family in FAMILIES.items()
    for head in family.heads
}
LABELS = ("b", "a", "c")
PAIRS = [name for name, family in FAMILIES.items() if "n_encoder_layer" in family.keys]
DECODERS = [name for name, family in FAMILIES.items() if family.shape["causal"]]
DECODERS = [name for name in DECODERS if name not in PAIRS]
ENCODERS = [name for name in MODELS if name not in (*DECODERS, *PAIRS)]
every_model = pytest.mark.parametrize("name", MODELS)
every_decoder = pytest.mark.parametrize("name", DECODERS)


def family_of(name: str) -> Family:
    """The family of a model of that name."""
    return FAMILIES[MODELS[name][0]]


def shape_of(name: str) -> dict:
    """What all ModelConfigs of that name have."""
    family, head = family_of(name), MODELS[name][1]
    return family.shape | {"head": head, "labels": LABELS if head != "tokens" else ()}


@st.composite
def expressible(draw, name: str):
    """A ModelConfig that the family has."""
    dropout = draw(st.sampled_from([0.0, 0.1]))
    config = draw(model_configs(**shape_of(name), dropout=dropout))
    width = 23 if name == "qwen3" else 12 * config.n_head  # few channels magnify rounding
    family = family_of(name)
    split = {} if "head_size" in family.keys else {"head_size": None, "n_kv_head": None}
    if name in PAIRS:
        own = {"n_encoder_layer": draw(st.integers(1, 2)), "start_id": draw(st.integers(0, 16))}
        own |= {"scale_embeddings": draw(st.booleans()), "label_smoothing": 0.1}
        split |= own | {"mlp": draw(st.sampled_from(list(family.activations.values())))}
    return replace(config, n_embd=width, **split)


def their_config(name: str, ours: dict = SMALL, **theirs) -> transformers.PreTrainedConfig:
    """A config of transformers, of our keys as far as the family has them, and some of its own."""
    (family, head), names = MODELS[name], family_of(name).keys
    ours = ours | (OF_PAIRS if name in PAIRS else {})
    head = FAMILIES[family].heads[head]
    keys = {names[key]: value for key, value in ours.items() if key in names}
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    keys |= {"architectures": [head.architecture], **head.required}
    keys |= {own: keys[other] for own, other in family_of(name).alike.items() if other in keys}
    if shape_of(name)["labels"]:
        keys |= {"id2label": dict(enumerate(LABELS))}
    return transformers.AutoConfig.for_model(family, **ends | keys | theirs)


def their_class(config: transformers.PreTrainedConfig) -> type[transformers.PreTrainedModel]:
    return getattr(transformers, config.architectures[0])


def save_theirs(
    folder: Path, config, *, seed: int = 7, scale: float = 0.1, dtype=torch.float32, **options
) -> Path:
    """Write a model of transformers with random weights, and a tokenizer beside it."""
    torch.manual_seed(seed)
    model = scramble(their_class(config)(config), seed, scale=scale)
    for table in model.modules():
        if hasattr(table, "create_weight"):  # of sinusoids: they are not trained
            table.weight.data = table.create_weight()
    model.to(dtype).save_pretrained(folder, **options)
    write_tokenizer(CHARACTERS, folder, ModelConfig(block_size=T))
    return folder


def read_theirs(folder: Path) -> torch.nn.Module:
    kind = their_class(transformers.AutoConfig.from_pretrained(folder))
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def change_config(folder: Path, *, without: Iterable[str] = (), **changes: object) -> Path:
    """Change keys of config.json, or leave some out."""
    content = json.loads((folder / CONFIG).read_text()) | changes
    content = {key: value for key, value in content.items() if key not in without}
    (folder / CONFIG).write_text(json.dumps(content))
    return folder


def change_weights(folder: Path, change: Callable[[dict], object]) -> Path:
    """Change the tensors of model.safetensors, a dict by their names, in place."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert (found - wanted).abs().max() <= tolerance * max(1, wanted.abs().max())


@torch.no_grad()
def assert_same_logits(
    ours: Transformer, theirs: torch.nn.Module, *, length: int = T, tolerance: float = 1e-5
) -> None:
    """Those of random tokens are those of transformers; an encoder's rows are padded, of pairs."""
    ids = random_tokens(ours.config, 5, batch=3, length=length)
    if ours.config.n_encoder_layer:
        answers = random_tokens(ours.config, 6, batch=3, length=length - 2)
        mask = torch.arange(length) < torch.tensor([[length], [length - 3], [5]])
        found = ours(answers, source=ids, source_mask=mask)[0]
        options = {"attention_mask": mask.long(), "decoder_input_ids": answers}
        assert_close(found, theirs(ids, **options).logits, tolerance)
        return
    if ours.config.causal:
        assert_close(ours(ids)[0], theirs(ids).logits, tolerance)
        return
    mask = torch.arange(length) < torch.tensor([[length], [length - 3], [5]])
    options = {"attention_mask": mask.long()}
    places, types = None, None
    if ours.config.n_types:
        types = (torch.arange(length) >= 3).long().expand(3, -1)
        options["token_type_ids"] = types
        if ours.config.head == "text":
            places = torch.zeros(3, 1, dtype=torch.long)
    found = ours(ids, mask=mask, places=places, types=types)[0]
    wanted = theirs(ids, **options).logits
    if ours.config.head == "text":
        assert_close(found[:, 0], wanted, tolerance)
    else:
        assert_close(found[mask], wanted[mask], tolerance)


@torch.no_grad()
def assert_same_model(ours: Transformer, theirs: torch.nn.Module) -> None:
    """Logits, names of labels, loss, and 20 tokens, each the likeliest, are transformers'.

    Of an encoder-decoder those of four beams, too.
    """
    assert_same_logits(ours, theirs)
    if ours.config.n_encoder_layer:
        assert_same_answers(ours, theirs)
        return
    if not ours.config.causal:
        names = tuple(theirs.config.id2label.values())
        assert ours.config.labels in (names, ())
        return
    ids = random_tokens(ours.config, 5, batch=3, length=T)
    assert_close(ours(ids[:, :-1], ids[:, 1:])[1], theirs(ids, labels=ids).loss)
    prompt, mask = ids[:, :5], torch.ones(3, 5)
    drawn = generate(ours, prompt, max_new_tokens=20, temperature=0)
    wanted = theirs.generate(prompt, attention_mask=mask, max_new_tokens=20, do_sample=False)
    assert torch.equal(torch.stack(list(drawn), dim=1), wanted[:, 5:])


@torch.no_grad()
def assert_same_answers(ours: EncoderDecoder, theirs: torch.nn.Module) -> None:
    """Greedy ones and those of four beams, up to a token that ends them."""
    source, end = random_tokens(ours.config, 5, batch=3, length=9), 3
    mask = torch.arange(9) < torch.tensor([[9], [7], [4]])
    theirs.generation_config.forced_eos_token_id = None  # some would end where no room is left
    theirs.generation_config.encoder_no_repeat_ngram_size = 0
    options = {"max_new_tokens": 20, "do_sample": False, "early_stopping": False}
    options |= {"eos_token_id": end, "pad_token_id": 0, "length_penalty": 0.8}
    options |= {"decoder_start_token_id": ours.config.start_id, "attention_mask": mask.long()}
    start = torch.tensor([[ours.config.start_id]])
    limit = {"max_new_tokens": 20, "stop_ids": [end]}
    for beams in (1, 4):
        wanted = theirs.generate(source, num_beams=beams, **options)[:, 1:].tolist()
        for text, own, right in zip(source, mask, wanted, strict=True):
            memory = {"memory": ours.encode(text[None], own[None]), "source_mask": own[None]}
            if beams == 1:
                drawn = generate(ours, start, temperature=0, **limit, **memory)
                found = [int(step) for step in drawn]
            else:
                keys = {"num_beams": beams, "length_penalty": 0.8}
                found = beam_search(ours, start, **keys, **limit, **memory).tolist()
            assert found == right[: len(found)]
            assert set(right[len(found) :]) <= {0, end}


def assert_equal(a: tuple[Transformer, Tokenizer], b: tuple[Transformer, Tokenizer]) -> None:
    """Two models and their tokenizers are the same, bit for bit."""
    (model, tokenizer), (other, other_tokenizer) = a, b
    assert (model.config, tokenizer) == (other.config, other_tokenizer)
    pairs = zip(model.state_dict().items(), other.state_dict().items(), strict=True)
    assert all(name == twin and torch.equal(x, y) for (name, x), (twin, y) in pairs)


def refusal(of: Callable, *arguments: object) -> str:
    """The one line with which something is refused."""
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        of(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)
