"""Laws of tokenizers in Hugging Face's files: they encode there as they do here."""

import json
import pickle
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from test_tokenizer import CORPUS, GPT4_SPLIT, SPECIAL
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from nanolm.bpe import N_BYTES
from nanolm.hub.names import read_json
from nanolm.hub.tokenizers import (
    find_tokenizer,
    is_pretrained,
    pipeline_of,
    read_tokenizer,
    write_tokenizer,
)
from nanolm.layers import ModelConfig
from nanolm.tasks.causal import encode_prompt, opening
from nanolm.text.bpe_tokenizer import END_OF_TEXT, BPETokenizer
from nanolm.text.char_tokenizer import CharTokenizer
from nanolm.text.data import open_dataset
from nanolm.text.pretrained import PretrainedTokenizer, open_pipeline
from nanolm.text.tokenizer import TOKENIZER_FILE, existing, load_tokenizer, stream_text

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LEARNED = BPETokenizer.train(CORPUS, 400, special_tokens=SPECIAL)
BLOCK_SIZE = 10**7  # longer than any text here, or transformers complains
OURS = {
    "characters": CharTokenizer.train([*CORPUS, "\x1c\x85\u180e\u2028\0"]),
    "bytes": BPETokenizer.train([], N_BYTES, special_tokens=[]),
    "GPT-2's pattern": LEARNED,
    "GPT-4's pattern": BPETokenizer.train(CORPUS, 380, pattern=GPT4_SPLIT),
    "Qwen's pattern": BPETokenizer.train(CORPUS, 380, pattern=QWEN_SPLIT),
    "letters only": BPETokenizer(LEARNED.ranks, LEARNED.special_tokens, pattern=r"[a-z]+"),
    "NFC": BPETokenizer(LEARNED.ranks, LEARNED.special_tokens, normal_form="NFC"),
    "NFKD": BPETokenizer(LEARNED.ranks, LEARNED.special_tokens, normal_form="NFKD"),
    "first ids": BPETokenizer(
        {token: len(SPECIAL) + i for token, i in LEARNED.ranks.items()},
        {token: i for i, token in enumerate(SPECIAL)},
    ),
    "other end": BPETokenizer(LEARNED.ranks, LEARNED.special_tokens, end_token=SPECIAL[1]),
}
write = partial(write_tokenizer, model=ModelConfig(block_size=BLOCK_SIZE))

# Characters that regex engines of other Unicode versions see alike (see test_tokenizer.py).
known = [*SPECIAL, *" ".join(CORPUS).split(" "), *"\n\r\t 1aé", "  ", "'ll", "'LL", "'\u017f"]
odd_blanks = [*"\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u180e\u2007\u2028\u2029\u200b\u3000\ufeff"]
others = st.text(st.characters(exclude_categories=["Cs", "Cn"]))
texts = st.lists(st.sampled_from(known + odd_blanks) | others).map("".join)


def texts_of(tokenizer):
    """Texts that a tokenizer can encode."""
    bpe = isinstance(tokenizer, BPETokenizer)
    return texts if bpe else st.text(st.sampled_from(tokenizer.characters))


def encode(tokenizer, text):
    return tokenizer.encode(text, allowed_special="all")


# ------------------------------------------------------------------------------------------
# Out


@pytest.fixture(scope="module", params=[*OURS, "GPT-2"])
def pair(request, tmp_path_factory):
    """A tokenizer (ours), what transformers makes of its files (theirs), and their folder."""
    if request.param == "GPT-2":
        ours = BPETokenizer.gpt2(request.getfixturevalue("test_data") / "gpt2")
    else:
        ours = OURS[request.param]
    folder = tmp_path_factory.mktemp("written")
    write(ours, folder)
    write_json(folder, config={"model_type": "llama"})  # a family with a tokenizer of its own
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    return SimpleNamespace(ours=ours, theirs=theirs, folder=folder)


@given(data=st.data())
def test_transformers_encodes_and_decodes_every_text_alike(pair, data):
    text = data.draw(texts_of(pair.ours))
    ids = encode(pair.ours, text)
    assert pair.theirs.encode(text) == ids
    assert pair.theirs.decode(ids) == pair.ours.decode(ids)


@pytest.mark.parametrize("length", [50_000, pytest.param(None, marks=pytest.mark.long)])
def test_transformers_encodes_tiny_shakespeare_alike(pair, length, test_data):
    text = (test_data / "tinyshakespeare.txt").read_text(encoding="utf-8")[:length]
    if isinstance(pair.ours, CharTokenizer):
        text = "".join(filter(pair.ours.characters.__contains__, text))
    ids = pair.ours.encode(text)
    assert pair.theirs.encode(text) == ids
    assert pair.theirs.decode(ids) == text


def test_transformers_has_the_same_tokens_and_ends_a_text_alike(pair):
    """No token is for padding: a model there learns nothing about it, and a collator masks it."""
    ours, theirs = pair.ours, pair.theirs
    assert len(theirs) == ours.vocab_size
    assert theirs.bos_token_id == theirs.eos_token_id == ours.end_of_text
    assert theirs.pad_token_id is None
    assert theirs.model_max_length == BLOCK_SIZE
    for token, i in ours.special_tokens.items():
        assert theirs.encode(f"b{token}b") == encode(ours, "b") + [i] + encode(ours, "b")


def test_an_unknown_character_is_an_error_there_too(tmp_path):
    write(CharTokenizer("abc"), tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(Exception, match=r"Missing .* token from the vocabulary"):
        theirs.encode("abéc")


@pytest.mark.parametrize("pair", OURS, indirect=True)
def test_what_is_written_is_read_as_the_same_tokenizer(pair, tmp_path):
    """Also after transformers has loaded it and saved it again."""
    pair.theirs.save_pretrained(tmp_path)
    for folder in (pair.folder, tmp_path):
        assert is_pretrained(folder)
        assert read_tokenizer(folder) == pair.ours


def test_a_vocabulary_that_no_merges_make_cannot_be_written(tmp_path):
    tokenizer = BPETokenizer(LEARNED.ranks | {b"zzz": len(LEARNED.ranks)})
    with pytest.raises(ValueError, match="token b'zzz' is not made by a merge"):
        write(tokenizer, tmp_path)
    assert not is_pretrained(tmp_path)


@pytest.mark.parametrize("special", ["a", "the", "Ġthe", "<é>"])
def test_a_special_token_that_a_file_takes_for_text_cannot_be_written(special, tmp_path):
    """A file has one table of names, in which "Ġthe" is a space and a word, and "é" one byte."""
    tokenizer = BPETokenizer.train(["the the the"], 260, special_tokens=[special])
    with pytest.raises(ValueError, match=f"special token {special!r}"):
        write(tokenizer, tmp_path)
    assert not is_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------
# In


def pipeline(model, trainer=None, *, around="$A", **steps):
    """A pipeline of the library; around: what it puts before and behind every text, $A."""
    made = Tokenizer(model)
    for name, step in steps.items():
        setattr(made, name, step)
    if trainer:
        made.train_from_iterator(CORPUS, trainer(vocab_size=400, show_progress=False))
    made.add_special_tokens(SPECIAL)
    ends = [(token, made.token_to_id(token)) for token in SPECIAL]
    made.post_processor = processors.TemplateProcessing(around, special_tokens=ends)
    return made


def byte_level(*steps, **options):
    """A byte-level BPE. steps: its pre-tokenizers."""
    cut = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(list(steps))
    trainer = partial(trainers.BpeTrainer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    options |= {"pre_tokenizer": cut, "decoder": decoders.ByteLevel()}
    return pipeline(models.BPE(), trainer, **options)


def with_every_merge(made):
    """The file as it is made from tiktoken's ranks: it names each way to cut a token in two."""
    content = json.loads(made.to_str())
    ids = content["model"]["vocab"]
    cuts = [(token[:i], token[i:]) for token in ids for i in range(1, len(token))]
    merges = sorted((cut for cut in cuts if set(cut) <= set(ids)), key=lambda c: ids["".join(c)])
    content["model"] |= {"merges": merges, "ignore_merges": True}
    return Tokenizer.from_str(json.dumps(content))


by_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
digits = pre_tokenizers.Digits(individual_digits=True)
by_gpt4, by_qwen = (
    pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (GPT4_SPLIT, QWEN_SPLIT)
)
BYTE_LEVEL = {
    "GPT-2": byte_level(by_gpt2),
    "Llama 3": with_every_merge(byte_level(by_gpt4, spell, around=f"{END_OF_TEXT} $A")),
    "Qwen": byte_level(by_qwen, spell, normalizer=normalizers.NFC()),
    "SmolLM": byte_level(digits, by_gpt2),
}
words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(N_BYTES)), *"▁the", "▁t", "he", "▁the"]
OTHERS = {
    "Llama 2": pipeline(
        models.BPE(
            {word: i for i, word in enumerate(words)},
            [("▁", "t"), ("h", "e"), ("▁t", "he")],
            unk_token="<unk>",
            byte_fallback=True,
        ),
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        decoder=decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
            + [decoders.Strip(" ", 1, 0)]
        ),
        around=f"{END_OF_TEXT} $A",
    ),
    "T5": pipeline(
        models.Unigram(),
        partial(trainers.UnigramTrainer, unk_token="<unk>", special_tokens=["<unk>"]),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
        around=f"$A {END_OF_TEXT}",
    ),
    "BERT": pipeline(
        models.WordPiece(unk_token="[UNK]"),
        partial(trainers.WordPieceTrainer, special_tokens=["[UNK]"]),
        normalizer=normalizers.BertNormalizer(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(),
        around=f".* $A {END_OF_TEXT}",
    ),
}
PIPELINES = BYTE_LEVEL | OTHERS


def read(folder, pipeline, **settings):
    """What is read where this pipeline and these settings are the files."""
    content = pipeline if isinstance(pipeline, dict) else json.loads(pipeline.to_str())
    write_json(folder, tokenizer=content, tokenizer_config=settings)
    return read_tokenizer(folder)


def write_json(folder, **contents):
    """Write each content to the file of that name."""
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="module", params=PIPELINES)
def read_in(request, tmp_path_factory):
    """A pipeline of the library (theirs), and what is read of its file (ours)."""
    theirs = PIPELINES[request.param]
    ours = read(tmp_path_factory.mktemp("library"), theirs)
    bytes_only = request.param in BYTE_LEVEL
    return SimpleNamespace(ours=ours, theirs=theirs, bytes_only=bytes_only)


@given(text=texts)
def test_any_pipeline_encodes_and_decodes_every_text_as_the_library_does(read_in, text):
    ids = read_in.theirs.encode(text, add_special_tokens=False).ids
    assert encode(read_in.ours, text) == ids
    assert read_in.ours.decode(ids) == read_in.theirs.decode(ids, skip_special_tokens=False)


@given(text=texts)
def test_one_by_one_the_tokens_give_the_bytes_of_the_text(read_in, text):
    """But for the blank that a text loses at its start, and BERT's blanks, which it forgets."""
    ids = read_in.ours.encode(text)
    streamed, whole = "".join(stream_text(read_in.ours, ids)), read_in.ours.decode(ids)
    if read_in.bytes_only:
        assert streamed == whole
    else:
        assert "".join(streamed.split()) == "".join(whole.split())


@given(text=texts)
def test_what_looks_like_a_special_token_is_ordinary_text(read_in, text):
    ids = set(read_in.ours.encode(text))
    assert not ids.intersection(read_in.ours.special_tokens.values()) or not read_in.bytes_only


def test_what_is_read_is_the_same_in_datasets_exports_and_other_processes(read_in, tmp_path):
    ours = read_in.ours
    ours.save(tmp_path / TOKENIZER_FILE)
    write(ours, tmp_path)
    copies = load_tokenizer(tmp_path), read_tokenizer(tmp_path), pickle.loads(pickle.dumps(ours))
    for copy in copies:
        assert copy == ours
        assert copy.encode(CORPUS[0] + END_OF_TEXT) == ours.encode(CORPUS[0] + END_OF_TEXT)
    others = [theirs for theirs in PIPELINES.values() if theirs is not read_in.theirs]
    assert ours not in [read(tmp_path, other) for other in others]


@pytest.mark.parametrize(
    ("name", "begin"),
    [
        ("Llama 3", END_OF_TEXT),
        ("Llama 2", END_OF_TEXT),
        ("BERT", ".*"),
        ("T5", None),
        ("Qwen", None),
    ],
)
def test_the_token_that_a_pipeline_puts_before_every_text_is_known(name, begin, tmp_path):
    """Prompts for Llama 3 began without it, a text such as the model had never seen."""
    ours = read(tmp_path, PIPELINES[name])
    assert ours.begin_of_text == ours.special_tokens.get(begin)
    assert ours.begin_of_text not in encode(ours, "a")


def test_ids_may_have_gaps(tmp_path):
    """A model has a row for each id below the largest, with or without a token."""
    model = {"type": "BPE", "vocab": {"a": 3, "b": 5}, "merges": []}
    ours = read(tmp_path, {"version": "1.0", "model": model, "decoder": {"type": "Fuse"}})
    assert ours.vocab_size == 6
    assert ours.decode_bytes([3, 4, 5]) == b"ab"
    with pytest.raises(ValueError, match="id 6 is outside the vocabulary of 6 tokens"):
        ours.decode_bytes([3, 6])


def test_a_pipeline_does_not_pad_or_cut_off_texts(tmp_path):
    """As files of models for sentences say."""
    theirs = Tokenizer.from_str(BYTE_LEVEL["Qwen"].to_str())
    theirs.enable_truncation(2)
    theirs.enable_padding(length=99)
    assert read(tmp_path, theirs).encode("a b c d e") == BYTE_LEVEL["Qwen"].encode("a b c d e").ids


def test_without_the_package_it_is_said_what_to_install(tmp_path, monkeypatch):
    read(tmp_path, BYTE_LEVEL["Qwen"]).save(tmp_path / TOKENIZER_FILE)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    open_pipeline.cache_clear()
    refuses(tmp_path, "pip install tokenizers")
    with pytest.raises(ValueError, match="pip install tokenizers"):
        load_tokenizer(tmp_path).encode("a")
    with pytest.raises(ValueError, match="pip install tokenizers"):
        write(LEARNED, tmp_path)


# ------------------------------------------------------------------------------------------
# In: what is one of ours


@pytest.fixture(scope="module")
def hubs_gpt2(test_data):
    """GPT-2's tokenizer.json: what the library makes of OpenAI's files, and a few empty keys."""
    files = (str(test_data / "gpt2" / name) for name in ("encoder.json", "vocab.bpe"))
    affixes = {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    made = Tokenizer(models.BPE.from_file(*files, **affixes))
    made.pre_tokenizer, made.decoder = by_gpt2, decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    made.add_special_tokens([AddedToken(END_OF_TEXT, normalized=True)])
    return json.loads(made.to_str())


def test_the_hubs_gpt2_is_gpt2(hubs_gpt2, test_data, tmp_path):
    """Whose texts are prepared with tiktoken, and it encodes several times as fast."""
    assert read(tmp_path, hubs_gpt2) == BPETokenizer.gpt2(test_data / "gpt2")


def changed(content, path, value):
    """The content with another value at a path of keys; a function makes it of the old one."""
    key, *rest = path
    copy = content.copy()
    old = copy.get(key) if isinstance(copy, dict) else copy[key]
    copy[key] = changed(old, rest, value) if rest else value(old) if callable(value) else value
    return copy


GPT2 = json.loads(BYTE_LEVEL["GPT-2"].to_str())
CHANGES = {
    "nothing": (("version",), "1.0"),
    "merges in another order": (("model", "merges"), lambda merges: merges[::-1]),
    "a merge less": (("model", "merges"), lambda merges: merges[1:]),
    "whole words first": (("model", "ignore_merges"), True),
    "a word more": (("model", "vocab"), lambda vocab: vocab | {"日": 450}),
    "a blank before": (("pre_tokenizer", "add_prefix_space"), True),
    "no pattern": (("pre_tokenizer", "use_regex"), False),
    "words": (("pre_tokenizer",), {"type": "Whitespace"}),
    "lower case": (("normalizer",), {"type": "Lowercase"}),
    "blanks taken away": (("added_tokens", 0, "lstrip"), True),
    "single words": (("added_tokens", 0, "single_word"), True),
    "an ordinary token": (("added_tokens", 0, "special"), False),
    "a token before each text": (
        ("post_processor", "single"),
        lambda single: [{"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}, *single],
    ),
}


@pytest.mark.parametrize(("path", "value"), CHANGES.values(), ids=CHANGES)
def test_what_only_looks_like_gpt2_stays_a_pipeline(path, value, tmp_path):
    content = changed(GPT2, path, value)
    ours, theirs = read(tmp_path, content), Tokenizer.from_str(json.dumps(content))
    assert isinstance(ours, PretrainedTokenizer) == (path != ("version",))
    assert (END_OF_TEXT in ours.special_tokens) == ("special" not in path)
    for text in [*CORPUS, f"The x{END_OF_TEXT} y {END_OF_TEXT}"]:
        assert encode(ours, text) == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("NFC", ("added_tokens", 0, "normalized"), True),
        ("characters", ("model", "vocab"), {"<unk>": 0, "a": 1}),
        ("characters", ("model", "vocab"), {"b": 0, "a": 1}),
        ("characters", ("model", "unk_token"), "a"),
        ("characters", ("normalizer",), {"type": "Lowercase"}),
        ("characters", ("pre_tokenizer",), {"type": "Whitespace"}),
        (
            "characters",
            ("added_tokens",),
            json.loads(BYTE_LEVEL["GPT-2"].to_str())["added_tokens"],
        ),
    ],
)
def test_what_only_looks_like_ours_stays_a_pipeline(name, path, value, tmp_path):
    content = json.loads(pipeline_of(OURS[name]).to_str())
    assert read(tmp_path, content) == OURS[name]
    assert isinstance(read(tmp_path, changed(content, path, value)), PretrainedTokenizer)


# ------------------------------------------------------------------------------------------
# The end of a text


@pytest.mark.parametrize(
    ("eos", "expected"),
    [(SPECIAL[1], SPECIAL[1]), ({"content": SPECIAL[1]}, SPECIAL[1]), (None, END_OF_TEXT)],
)
@pytest.mark.parametrize("name", ["GPT-2", "Llama 3"])
def test_the_end_of_a_text_is_what_the_settings_say(name, eos, expected, tmp_path):
    tokenizer = read(tmp_path, PIPELINES[name], eos_token=eos)
    assert tokenizer.end_of_text == tokenizer.special_tokens[expected]


# ------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("eos", ["</s>", 5, {"content": ["a"]}])
def test_an_end_of_text_that_is_no_token_is_refused(eos, tmp_path):
    """Or no text would ever end."""
    read(tmp_path, BYTE_LEVEL["Qwen"])
    write_json(tmp_path, tokenizer_config={"eos_token": eos})
    refuses(tmp_path, "")


DAMAGE = ["", "{", '{"model": "\xff"}', "[" * 100_000, "3", "[]"]


@pytest.mark.parametrize("text", [*DAMAGE, "{}", '{"model": {"type": "BPE", "vocab": 3}}'])
def test_a_damaged_file_is_refused_by_name(text, tmp_path):
    for name in (
        ("tokenizer.json", "tokenizer_config.json") if text in DAMAGE else ("tokenizer.json",)
    ):
        read(tmp_path, BYTE_LEVEL["GPT-2"])
        (tmp_path / name).write_bytes(text.encode("latin-1"))
        refuses(tmp_path, "")


def test_a_folder_without_a_tokenizer_is_refused_by_name(tmp_path):
    """vocab.json and merges.txt are its older form, which transformers turns into the newer."""
    with pytest.raises(ValueError, match=f"{tmp_path} has no tokenizer.json: let transformers"):
        read_tokenizer(tmp_path)


def test_a_byte_order_mark_is_no_part_of_any_file(tiny_run, run_main, tmp_path):
    """It once made config.json "not a JSON object", and a prompt begin with what has no id."""
    folder = made(tmp_path / "marked")
    write(LEARNED, folder)
    Path("prompt.txt").write_text("little")
    run = [*Path("data/tiny").glob("*.json"), *tiny_run.glob("*.json"), Path("prompt.txt")]
    before = run_main("sample", f"--out_dir={tiny_run}", "--start=little", "--num_samples=1")
    for path in [*folder.glob("*.json"), *run]:
        content = path.read_bytes()
        path.write_bytes(b"\xef\xbb\xbf" + content)
    assert read_tokenizer(folder) == LEARNED
    assert isinstance(read_json(folder / "tokenizer_config.json"), dict)
    words = (f"--out_dir={tiny_run}", "--start=FILE:prompt.txt", "--num_samples=1")
    assert run_main("sample", *words) == before
    words = (f"--out_dir={tiny_run}", "--init_from=resume", "--max_iters=6")
    assert run_main("train", *words)[0::2] == (0, "")


def test_some_special_tokens_alone_cannot_be_allowed_in_a_pipeline(tmp_path):
    with pytest.raises(ValueError, match=r"choose \(\) or 'all'"):
        read(tmp_path, BYTE_LEVEL["Qwen"]).encode("a", allowed_special=[END_OF_TEXT])


def refuses(folder, reason):
    """The tokenizer in a folder is refused in one line."""
    with pytest.raises(ValueError, match=f"^cannot use the tokenizer .*{reason}") as error:
        read_tokenizer(folder)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------
# By name


def test_a_tokenizer_is_found_in_files_datasets_runs_and_pretrained_models(tiny_run, tmp_path):
    trained = CharTokenizer.train([Path("text.txt").read_text(encoding="utf-8")])
    write(trained, made(tmp_path / "pretrained"))
    write(LEARNED, tiny_run)  # a run has a tokenizer of its own
    for name in (tiny_run, tiny_run / TOKENIZER_FILE, "data/tiny", tmp_path / "pretrained"):
        assert find_tokenizer(str(name)) == trained
    for name in ("tokenizer.json", "tokenizer_config.json"):  # a file instead of its folder
        assert find_tokenizer(str(tmp_path / "pretrained" / name)) == trained


def test_prepare_takes_the_tokenizer_of_a_pretrained_model(tiny_run, run_main, tmp_path):
    write(OURS["NFC"], made(tmp_path / "pretrained"))
    flags = "new", "--input", "text.txt", "--tokenizer=pretrained"
    code, _, errors = run_main("prepare", *flags)
    assert code == 0, errors
    dataset = open_dataset("new")
    text = Path("text.txt").read_text(encoding="utf-8")
    ids = [*dataset.train, *dataset.val]
    assert dataset.tokenizer == OURS["NFC"]
    assert dataset.tokenizer.decode(map(int, ids)).replace(END_OF_TEXT, "") == text


@pytest.mark.parametrize("name", PIPELINES)
def test_texts_and_prompts_have_the_token_that_their_tokenizer_puts_before_them(
    name, workplace, run_main
):
    """Llama 3's was left out: it was shown texts such as it had never seen."""
    read(made(workplace / "pretrained"), PIPELINES[name], eos_token=SPECIAL[1])
    Path("two.jsonl").write_text(json.dumps({"text": "a wolf"}) + "\n" + json.dumps({"text": "a"}))
    flags = "new", "--input", "two.jsonl", "--tokenizer=pretrained", "--val_fraction=0.4"
    assert run_main("prepare", *flags)[0] == 0
    dataset = open_dataset("new")
    ours = dataset.tokenizer
    begin, end = existing(ours.begin_of_text), [ours.end_of_text]
    ids = begin + ours.encode("a wolf") + end + begin + ours.encode("a") + end + begin
    assert [*dataset.train, *dataset.val] == ids
    size = sum(dataset.meta[split]["bytes"] for split in ("train", "val"))
    assert size == len("a wolf" + "a") or name in OTHERS
    assert [opening(ours)] == (begin or end)
    assert encode_prompt(ours, "a wolf") == begin + ours.encode("a wolf")
    for i in begin:
        prompt = PIPELINES[name].id_to_token(i) + "a"
        assert encode_prompt(ours, prompt) == encode(ours, prompt)


def made(folder):
    folder.mkdir()
    return folder


def test_a_tokenizer_of_ours_may_have_the_name_of_theirs(workplace):
    own = BPETokenizer.train(["to be or not to be"], 260)
    own.save(Path("tokenizer.json"))
    assert find_tokenizer("tokenizer.json").encode("to be") == own.encode("to be")
