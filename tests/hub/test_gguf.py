"""Laws of GGUF files: what they hold, and that llama.cpp writes with them what is written here.

What runs in llama.cpp needs the package llama-cpp-python, which is compiled where it is installed:
without it, these laws are skipped.
"""

import json
import sys
import unicodedata
from contextlib import closing
from ctypes import create_string_buffer
from importlib.util import find_spec
from itertools import islice, takewhile
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import numpy as np
import pytest
import torch
from conftest import TEXT
from hypothesis import given, settings
from jinja2 import Template
from pretrained import CHARACTERS, DECODERS, every_decoder, expressible, refusal, shape_of
from strategies import random_tokens, scramble, seeds
from test_tokenizer import CORPUS, GPT4_SPLIT, SPECIAL
from test_tokenizers import (
    BYTE_LEVEL,
    OTHERS,
    QWEN_SPLIT,
    by_qwen,
    byte_level,
    changed,
    read,
    spell,
    texts,
    with_every_merge,
)
from tokenizers import Regex, pre_tokenizers

from nanolm.hub.gguf import DTYPES, WITHOUT_BIAS, cut_of, export_gguf
from nanolm.hub.models import export_model
from nanolm.layers import ModelConfig
from nanolm.model import GPT, build_model
from nanolm.tasks.answering import stop_ids
from nanolm.text.bpe_tokenizer import END_OF_TEXT, BPETokenizer
from nanolm.text.conversations import CHAT_TOKENS, answer_opening, chatml
from nanolm.text.pretrained import open_pipeline
from nanolm.text.tokenizer import Tokenizer

needs_llama = pytest.mark.skipif(not find_spec("llama_cpp"), reason="needs llama-cpp-python")
every_dtype = pytest.mark.parametrize("dtype", DTYPES)

WORDS = BPETokenizer.train([TEXT], 300)
FINE = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "head_size": 16, "n_embd": 96, "n_hidden": 64}
FINE |= {"vocab_size": WORDS.vocab_size, "block_size": 64, "norm_eps": 0.1, "rope_theta": 100.0}


def model_of(config: ModelConfig, name: str, seed: int = 0, scale: float = 0.1) -> GPT:
    """A random decoder of that family, without the biases for which llama.cpp has no place."""
    torch.manual_seed(seed)
    model = scramble(build_model(config), seed, scale=scale).eval()
    lacking = {"attn_output": "attn.out", "ffn_up": "mlp.up", "ffn_down": "mlp.down"}
    modules = [lacking[module] for module in WITHOUT_BIAS.get(name, ())]
    modules += ["mlp.gate", "mlp.up", "mlp.down"] * (name == "qwen3")
    for own, parameter in model.named_parameters():
        if own.endswith(tuple(f"{module}.bias" for module in modules)):
            torch.nn.init.zeros_(parameter)
    return model


def fine_model(name: str, seed: int = 0, *, scale: float = 0.1, **keys) -> GPT:
    """One of whole groups of 32 numbers, with the vocabulary WORDS."""
    own = {"head_size": None, "n_kv_head": None} if name == "gpt2" else {}
    return model_of(ModelConfig(**FINE | shape_of(name) | own | keys), name, seed, scale)


# ------------------------------------------------------------------------------------------
# What a file holds

NAMES = {"token_embd": "tokens", "position_embd": "positions", "output_norm": "norm"}
NAMES |= {"output": "head"}
IN_A_BLOCK = {"attn_norm": "attn_norm", "ffn_norm": "mlp_norm", "attn_output": "attn.out"}
IN_A_BLOCK |= {f"attn_{part}": f"attn.{part}" for part in ("q", "k", "v", "q_norm", "k_norm")}
IN_A_BLOCK |= {f"ffn_{part}": f"mlp.{part}" for part in ("up", "gate", "down")}


def expected(model: GPT, name: str) -> dict[str, np.ndarray]:
    """The tensors of a file by their names there, spelled out once more."""
    ours = {own: tensor.numpy() for own, tensor in model.state_dict().items()}
    hs, found = model.config.head_size, {}
    names = NAMES | {
        f"blk.{i}.{theirs}": f"blocks.{i}.{own}"
        for i in range(model.config.n_layer)
        for theirs, own in IN_A_BLOCK.items()
    }
    for kind in ("weight", "bias"):
        for theirs, own in names.items():
            if f"{own}.{kind}" in ours:
                found[f"{theirs}.{kind}"] = ours[f"{own}.{kind}"]
    if model.config.tie_embeddings:
        del found["output.weight"]
    for theirs in list(found):
        if name in ("llama", "arcee") and (".attn_q." in theirs or ".attn_k." in theirs):
            heads = found[theirs].reshape(-1, hs, *found[theirs].shape[1:])
            order = [i // 2 + i % 2 * (hs // 2) for i in range(hs)]
            found[theirs] = heads[:, order].reshape(found[theirs].shape)
        if name == "gpt2" and ".attn_q." in theirs:
            parts = [found.pop(theirs.replace("_q.", f"_{part}.")) for part in "qkv"]
            found[theirs.replace("_q.", "_qkv.")] = np.concatenate(parts)
    return found


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file in float32."""
    tensors = gguf.GGUFReader(path).tensors
    return {t.name: gguf.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in tensors}


@every_decoder
def test_a_file_holds_every_tensor_and_no_other(name, tmp_path):
    """But for biases that the model has not, which may be there as zeros."""

    @settings(max_examples=10)
    @given(expressible(name), seeds)
    def law(config, seed):
        model = model_of(ModelConfig(**vars(config) | {"vocab_size": 300}), name, seed)
        with TemporaryDirectory() as place:
            assert export_gguf(model, WORDS, f"{place}/a.gguf") == name
            found = tensors_of(Path(place, "a.gguf"))
        wanted = expected(model, name)
        for theirs, tensor in wanted.items():
            np.testing.assert_array_equal(found.pop(theirs, np.zeros(tensor.shape)), tensor)
        assert all(theirs.endswith(".bias") and not x.any() for theirs, x in found.items())

    law()


@every_dtype
@every_decoder
def test_matrices_are_rounded_as_asked_and_vectors_are_not(name, dtype, tmp_path):
    model = fine_model(name, n_hidden=33)  # down has no rows of whole groups
    export_gguf(model, WORDS, tmp_path / "a.gguf", dtype=dtype)
    wanted = expected(model, name)
    for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors:
        whole = dtype != "q8_0" or tensor.shape[0] % 32 == 0
        kind = "f32" if len(tensor.shape) == 1 else dtype if whole else "f16"
        assert tensor.tensor_type.name == kind.upper()
        found = gguf.dequantize(tensor.data, tensor.tensor_type)
        x = wanted.get(tensor.name, np.zeros_like(found))
        share = {"f32": 0, "f16": 2**-11, "q8_0": 1 / 254 + 2**-11}[kind]  # half a step
        assert np.abs(found - x).max() <= share * np.abs(x).max()
    assert tensors_of(tmp_path / "a.gguf").keys() >= wanted.keys()


def test_what_16_bits_cannot_hold_is_kept_in_32(tmp_path):
    model = fine_model("llama")
    model.blocks[1].mlp.up.weight.data[3, 4] = 1e5
    export_gguf(model, WORDS, tmp_path / "a.gguf", dtype="f16")
    found = tensors_of(tmp_path / "a.gguf")["blk.1.ffn_up.weight"]
    np.testing.assert_array_equal(found, model.blocks[1].mlp.up.weight.detach())


def fields_of(path: Path) -> dict:
    """The keys of a file."""
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}


@every_decoder
def test_a_file_says_the_shape_of_its_model(name, tmp_path):
    model = fine_model(name)
    config = model.config
    export_gguf(model, WORDS, tmp_path / "a.gguf", dtype="f16")
    found = fields_of(tmp_path / "a.gguf")
    rotary = config.position == "rotary"
    eps = "layer_norm_rms_epsilon" if rotary else "layer_norm_epsilon"
    wanted = {
        "context_length": 64,
        "block_count": 2,
        "embedding_length": 96,
        "feed_forward_length": 64,
        "vocab_size": 300,
        "attention.head_count": 4,
        "attention.head_count_kv": config.n_kv_head,
        "attention.key_length": config.head_size,
        "attention.value_length": config.head_size,
        f"attention.{eps}": pytest.approx(0.1),
    }
    if rotary:
        wanted |= {"rope.dimension_count": 16, "rope.freq_base": 100.0}
    own = {key.removeprefix(f"{name}."): x for key, x in found.items() if key.startswith(name)}
    assert own == wanted
    assert found["general.architecture"] == name
    assert found["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16


# ------------------------------------------------------------------------------------------
# Vocabularies

MODEL = GPT(ModelConfig(vocab_size=2, block_size=8, n_layer=1, n_head=1, n_embd=32))


def export_vocabulary(tokenizer: Tokenizer, path: Path) -> Path:
    """A file with that tokenizer, beside a model that is of no use but for its size."""
    keys = vars(MODEL.config) | {"vocab_size": tokenizer.vocab_size}
    export_gguf(build_model(ModelConfig(**keys)), tokenizer, path)
    return path


LEARNED = BPETokenizer.train(CORPUS, 400, special_tokens=SPECIAL)
CHATTING = BPETokenizer.train([TEXT], 300, special_tokens=["<|endoftext|>", *CHAT_TOKENS])
OURS = {
    "learned": LEARNED,
    "bytes": BPETokenizer.train([], 257),
    "chat": CHATTING,
    "other end": BPETokenizer(LEARNED.ranks, LEARNED.special_tokens, end_token=SPECIAL[2]),
    "first ids": BPETokenizer(
        {token: len(SPECIAL) + i for token, i in LEARNED.ranks.items()},
        {token: i for i, token in enumerate(SPECIAL)},
    ),
}
# As Llama 3 and DBRX cut: as Qwen, but for numbers.
by_llama = pre_tokenizers.Split(Regex(QWEN_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")), "isolated")
THEIRS = BYTE_LEVEL | {
    "Llama 3": with_every_merge(byte_level(by_llama, spell, around=f"{END_OF_TEXT} $A")),
    "DBRX": byte_level(by_llama, spell),
    "Qwen, begun": byte_level(by_qwen, spell, around=f"{END_OF_TEXT} $A"),
}
CUTS = {"GPT-2": "gpt-2", "Llama 3": "llama-bpe", "Qwen": "qwen2", "SmolLM": "smollm"}
CUTS |= {"DBRX": "dbrx", "Qwen, begun": "qwen2"}


@pytest.fixture(scope="module")
def open_llama():
    """open_llama(path, **options) -> llama_cpp.Llama, which computes as exactly as it can."""
    llama_cpp = pytest.importorskip("llama_cpp")

    def start(path: Path, **options):
        exact = {"type_k": 0, "type_v": 0, "n_threads": 1, "n_threads_batch": 1}  # 0: float32
        return closing(llama_cpp.Llama(str(path), verbose=False, **exact | options))

    return start


@pytest.fixture(scope="module", params=[*OURS, *CUTS, "true GPT-2"])
def pair(request, tmp_path_factory, open_llama):
    """A tokenizer, and the same in llama.cpp."""
    folder = tmp_path_factory.mktemp("vocabulary")
    if request.param == "true GPT-2":
        ours = BPETokenizer.gpt2(request.getfixturevalue("test_data") / "gpt2")
    elif request.param in OURS:
        ours = OURS[request.param]
    else:
        ours = read(folder, THEIRS[request.param])
    path = export_vocabulary(ours, folder / "a.gguf")
    with open_llama(path, vocab_only=True) as llama:
        yield ours, llama


# llama.cpp knows no long s after an apostrophe, and brings no text to NFC.
foreign_texts = texts.map(lambda text: unicodedata.normalize("NFC", text.replace("\u017f", "s")))


@needs_llama
@given(text=foreign_texts)
def test_llama_cuts_every_text_into_the_same_tokens(pair, text):
    """But where whole words come first, a word of a special token's spelling is always that."""
    ours, llama = pair
    for special in (False, True):
        said = text
        if llama.metadata["tokenizer.ggml.pre"] == "llama-bpe" and not special:
            said = text.replace(SPECIAL[2], ". *")
        ids = ours.encode(said, allowed_special="all" if special else ())
        assert llama.tokenize(said.encode(), add_bos=False, special=special) == ids


@needs_llama
def test_llama_knows_the_bytes_of_every_token_and_what_begins_and_ends_a_text(pair):
    import llama_cpp

    ours, llama = pair
    vocabulary = llama_cpp.llama_model_get_vocab(llama.model)
    room = create_string_buffer(200)
    for i in range(ours.vocab_size):
        n = llama_cpp.llama_token_to_piece(vocabulary, i, room, len(room), 0, True)
        assert room[:n] == ours.decode_bytes([i])
        control = llama_cpp.llama_vocab_is_control(vocabulary, i)
        assert control == (i in ours.special_tokens.values())
    ends = [i for i in range(ours.vocab_size) if llama_cpp.llama_vocab_is_eog(vocabulary, i)]
    assert set(stop_ids(ours)) <= set(ends) <= set(ours.special_tokens.values())
    assert llama.token_eos() == ours.end_of_text
    begin = ours.begin_of_text
    assert llama.token_bos() == (ours.end_of_text if begin is None else begin)
    assert llama.tokenize(b"a")[:-1] == ([] if begin is None else [begin])


def test_ids_without_a_token_are_unused_and_added_words_are_no_control(tmp_path):
    content = json.loads(THEIRS["Qwen"].to_str())
    last = 420  # behind a gap
    word = content["added_tokens"][1] | {"id": last, "content": "<tool>", "special": False}
    content = changed(content, ("model", "vocab"), lambda vocab: vocab | {"<tool>": last})
    content = changed(content, ("added_tokens",), lambda added: [*added, word])
    tokenizer = read(tmp_path, content)
    fields = fields_of(export_vocabulary(tokenizer, tmp_path / "a.gguf"))
    kinds, kind = fields["tokenizer.ggml.token_type"], gguf.TokenType
    assert len(kinds) == last + 1
    assert (kinds[last], kinds[tokenizer.end_of_text]) == (kind.USER_DEFINED, kind.CONTROL)
    used = open_pipeline(tokenizer.pipeline).get_vocab().values()
    assert {i for i in range(last) if kinds[i] == kind.UNUSED} == set(range(last)) - set(used)


@pytest.mark.parametrize("name", CUTS)
def test_the_pattern_that_cuts_a_text_gets_its_name(name, tmp_path):
    fields = fields_of(export_vocabulary(read(tmp_path, THEIRS[name]), tmp_path / "a.gguf"))
    assert fields["tokenizer.ggml.pre"] == CUTS[name]


def test_a_conversation_becomes_the_tokens_that_were_learned(tmp_path):
    """By a template of plain Jinja; and a model of none has none."""
    fields = fields_of(export_vocabulary(CHATTING, tmp_path / "a.gguf"))
    messages = [("user", " a wolf\n"), ("assistant", "met a fox"), ("user", "and?")]
    prompt = Template(fields["tokenizer.chat_template"]).render(
        messages=[{"role": role, "content": text} for role, text in messages],
        add_generation_prompt=True,
    )
    said = [(role, text.strip()) for role, text in messages]
    wanted = chatml(said, CHATTING)[0] + answer_opening(CHATTING)
    assert CHATTING.encode(prompt, allowed_special="all") == wanted
    assert fields["tokenizer.ggml.eot_token_id"] == CHATTING.special_tokens["<|im_end|>"]
    other = fields_of(export_vocabulary(LEARNED, tmp_path / "b.gguf"))
    assert "tokenizer.chat_template" not in other


# ------------------------------------------------------------------------------------------
# What llama.cpp computes


@torch.no_grad()
def logits_here_and_there(model: GPT, path: Path, open_llama) -> tuple[np.ndarray, np.ndarray]:
    """Those of random tokens that fill the context: (T, V) each."""
    ids, n = random_tokens(model.config, 5, batch=1), model.config.block_size
    with open_llama(path, n_ctx=n, logits_all=True) as llama:
        llama.eval(ids[0].tolist())
        return model(ids)[0][0].numpy(), llama.scores[:n].copy()


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return np.abs(found - wanted).max() / np.abs(wanted).max()


@needs_llama
@pytest.mark.parametrize(
    ("name", "count"),
    [(name, 8) for name in DECODERS]
    + [pytest.param(name, 100, marks=pytest.mark.long) for name in DECODERS],
)
def test_llama_computes_the_same_logits(name, count, open_llama):
    """GPT-2's to 16 bits of the GELU, which it looks up in a table."""
    tolerance = 2e-3 if name == "gpt2" else 1e-5

    @settings(max_examples=count)
    @given(expressible(name), seeds)
    def law(config, seed):
        model = model_of(ModelConfig(**vars(config) | {"vocab_size": 300}), name, seed)
        with TemporaryDirectory() as place:
            export_gguf(model, WORDS, f"{place}/a.gguf")
            ours, theirs = logits_here_and_there(model, Path(place, "a.gguf"), open_llama)
        assert error(theirs, ours) <= tolerance

    law()


@needs_llama
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [("f16", 5e-3), ("q8_0", 5e-2)])
@every_decoder
def test_rounded_matrices_change_the_logits_by_their_rounding(
    name, dtype, tolerance, tied, tmp_path, open_llama
):
    model = fine_model(name, tie_embeddings=tied)
    export_gguf(model, WORDS, tmp_path / "a.gguf", dtype=dtype)
    ours, theirs = logits_here_and_there(model, tmp_path / "a.gguf", open_llama)
    assert tolerance / 100 < error(theirs, ours) <= tolerance


@needs_llama
@every_decoder
def test_llama_writes_what_sample_writes(name, workplace, run_main, open_llama):
    """40 tokens, each the likeliest, to a prompt and to none."""
    said = set()
    for seed in range(3):
        model = fine_model(name, seed, scale=0.5, tie_embeddings=seed == 0, bias=seed == 1)
        export_model(model, WORDS, f"there{seed}")
        words = f"there{seed}", f"{seed}.gguf"
        code, out, _ = run_main("nanolm/runs/export", *words)
        assert (code, out) == (0, f"there{seed}: written to {seed}.gguf as {name}, f32\n")
        with open_llama(Path(words[1]), n_ctx=64) as llama:
            for prompt in ("", "7 little wolves"):
                flags = ("--max_new_tokens=40", "--temperature=0", "--num_samples=1")
                flags += ("--device=cpu", f"--init_from={words[0]}", "--dtype=float32")
                _, out, _ = run_main("sample", *flags, *([f"--start={prompt}"] * bool(prompt)))
                given = llama.tokenize((prompt or END_OF_TEXT).encode(), special=True)
                drawn = islice(llama.generate(given, temp=0), 40)
                ids = list(takewhile(lambda i: i != WORDS.end_of_text, drawn))
                assert f"{prompt}{WORDS.decode(ids)}\n---------------\n" == out
                said.update(ids)
    assert len(said) > 20  # no model repeats itself all the time


# ------------------------------------------------------------------------------------------
# What is refused

CANNOT_BE = {
    "characters": CHARACTERS,
    "another pattern": BPETokenizer.train(CORPUS, 380, pattern=GPT4_SPLIT),
    "another form": BPETokenizer(LEARNED.ranks, LEARNED.special_tokens, normal_form="NFKC"),
    "no end": BPETokenizer.train([], 256, special_tokens=[]),
}


@pytest.mark.parametrize("name", [*CANNOT_BE, *OTHERS])
def test_a_tokenizer_that_llama_has_not_is_refused_with_the_way_out(name, tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    tokenizer = CANNOT_BE.get(name) or read(folder, OTHERS[name])
    found = refusal(export_vocabulary, tokenizer, tmp_path / "a" / "a.gguf")
    assert ("no token of the tokenizer ends a text" in found) == (name == "no end")
    assert found.endswith("name a folder")
    assert list(tmp_path.iterdir()) == [folder]


FIRST = ("pre_tokenizer", "pretokenizers", 0)


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("GPT-2", ("pre_tokenizer", "add_prefix_space"), True),
        ("GPT-2", ("pre_tokenizer",), None),
        ("GPT-2", ("model", "ignore_merges"), True),
        ("GPT-2", ("model", "vocab"), lambda vocab: {t: i for t, i in vocab.items() if t != "!"}),
        ("SmolLM", (*FIRST, "individual_digits"), False),
        ("Qwen", (*FIRST, "behavior"), "Removed"),
        ("Qwen", (*FIRST, "invert"), True),
        ("Qwen", (*FIRST, "pattern"), {"String": " "}),
    ],
)
def test_what_cuts_only_nearly_so_has_no_name(name, path, value):
    content = json.loads(THEIRS[name].to_str())
    assert cut_of(content) == CUTS[name]
    assert cut_of(changed(content, path, value)) is None


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"causal": False}, "the model is an encoder"),
        ({"n_encoder_layer": 1}, "the model is an encoder-decoder"),
        ({"position": "sinusoidal"}, "position='sinusoidal': Hugging Face has no such model"),
        (shape_of("arcee") | {"bias": True}, "o_proj.bias is not 0: llama.cpp's arcee"),
    ],
)
def test_a_model_that_llama_has_not_is_refused_by_what_it_is(keys, reason, tmp_path):
    config = ModelConfig(**FINE | {"head_size": 24, "n_kv_head": 4} | keys)
    model = scramble(build_model(config), 0)
    assert reason in refusal(export_gguf, model, WORDS, tmp_path / "a" / "a.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_stays_as_it_is(tiny_run, run_main):
    Path("a.gguf").write_text("mine")
    code, out, err = run_main("nanolm/runs/export", tiny_run, "a.gguf")
    assert (code, out) == (2, "")
    assert err == "error: a.gguf is there already: choose a new file\n"
    assert Path("a.gguf").read_text() == "mine"


def test_a_folder_has_no_other_dtype(run_main):
    code, _, err = run_main("nanolm/runs/export", "out/a", "there", "--dtype=q8_0")
    assert (code, err.count("\n")) == (2, 1)
    assert "name a file that ends in .gguf" in err


def test_a_file_onto_a_full_disk_leaves_nothing(tmp_path):
    resource = pytest.importorskip("resource")  # Windows has none
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        found = refusal(export_gguf, fine_model("llama"), WORDS, tmp_path / "a" / "a.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "a.gguf cannot be written" in found
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    found = refusal(export_gguf, fine_model("llama"), WORDS, tmp_path / "a.gguf")
    assert found.endswith("pip install gguf")


def test_it_is_said_that_texts_are_not_brought_to_a_form(tmp_path, capsys):
    export_vocabulary(read(tmp_path, BYTE_LEVEL["Qwen"]), tmp_path / "a.gguf")
    assert "NFC" in capsys.readouterr().err
