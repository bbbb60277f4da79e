"""Laws of tokenizers in Hugging Face's files: they encode there as they do here."""

import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st
from test_tokenizer import CORPUS, GPT4_SPLIT, SPECIAL, tiktokens_gpt2  # noqa: F401
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from nanolm.bpe import N_BYTES
from nanolm.hub.tokenizers import (
    ANY_CHARACTER,
    find_tokenizer,
    is_pretrained,
    read_tokenizer,
    write_tokenizer,
)
from nanolm.text.bpe_tokenizer import END_OF_TEXT
from nanolm.text.data import open_dataset
from nanolm.text.tokenizer import TOKENIZER_FILE, BPETokenizer, CharTokenizer

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
write = partial(write_tokenizer, block_size=BLOCK_SIZE)

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
    ours, theirs = pair.ours, pair.theirs
    assert len(theirs) == ours.vocab_size
    assert {theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id} == {ours.end_of_text}
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
# In: what the library tokenizers has learned


def learn(*steps, first=(), last=(), normalizer=None):
    """tokenizer.json of a byte-level BPE; first, last: special tokens below and above the text's.

    steps: its pre-tokenizers.
    """
    learned = tokenizers.Tokenizer(models.BPE())
    learned.normalizer = normalizer
    one = len(steps) == 1
    learned.pre_tokenizer = steps[0] if one else pre_tokenizers.Sequence(list(steps))
    learned.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=list(first), show_progress=False
    )
    learned.train_from_iterator(CORPUS, trainer)
    learned.add_special_tokens(list(last))
    return json.loads(learned.to_str())


def with_merges_as_text(content):
    """The file as the oldest versions of the library wrote it."""
    model = {key: content["model"][key] for key in ("dropout", "unk_token", "vocab")}
    merges = [" ".join(pair) for pair in content["model"]["merges"]]
    return content | {"model": model | {"merges": merges}}


def with_every_merge(content):
    """The file as it is made from tiktoken's ranks: it names each way to cut a token in two."""
    ids = content["model"]["vocab"]
    cuts = [(token[:i], token[i:]) for token in ids for i in range(1, len(token))]
    merges = sorted((cut for cut in cuts if set(cut) <= set(ids)), key=lambda c: ids["".join(c)])
    return content | {"model": content["model"] | {"merges": merges, "ignore_merges": True}}


by_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
digits = pre_tokenizers.Digits(individual_digits=True)
by_gpt4, by_qwen = (
    pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    for pattern in (GPT4_SPLIT, QWEN_SPLIT)
)
LIBRARYS = {
    "GPT-2": learn(by_gpt2, last=SPECIAL),
    "GPT-2, older": with_merges_as_text(learn(by_gpt2, last=SPECIAL)),
    "Llama 3": with_every_merge(learn(by_gpt4, spell, last=SPECIAL)),
    "Qwen": learn(by_qwen, spell, last=SPECIAL, normalizer=normalizers.NFC()),
    "SmolLM": learn(digits, by_gpt2, first=SPECIAL),
}


def write_json(folder, **contents):
    """Write each content to the file of that name."""
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="module", params=LIBRARYS)
def librarys(request, tmp_path_factory):
    """A tokenizer of the library, and what is read of its file."""
    folder = tmp_path_factory.mktemp("library")
    write_json(folder, tokenizer=LIBRARYS[request.param])
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return SimpleNamespace(ours=read_tokenizer(folder), theirs=theirs)


@given(text=texts)
def test_a_tokenizer_of_the_library_encodes_every_text_alike_here(librarys, text):
    ids = librarys.theirs.encode(text).ids
    assert encode(librarys.ours, text) == ids
    assert librarys.ours.decode(ids) == librarys.theirs.decode(ids, skip_special_tokens=False)


@given(words=st.lists(st.sampled_from([*"  \n\n\t\r'a1\u00bd\u0664\u1680.", "'s"]), max_size=9))
def test_blanks_digits_and_apostrophes_are_cut_alike(librarys, words):
    """Where the patterns differ from each other: what leaves a blank to the word after it."""
    text = "".join(words)
    assert encode(librarys.ours, text) == librarys.theirs.encode(text).ids


def test_special_tokens_keep_their_ids_wherever_they_are(librarys):
    ids = librarys.theirs.get_added_tokens_decoder()
    assert librarys.ours.special_tokens == {token.content: i for i, token in ids.items()}
    assert librarys.ours.vocab_size == librarys.theirs.get_vocab_size()


@pytest.mark.parametrize(
    ("eos", "expected"),
    [(SPECIAL[1], SPECIAL[1]), ({"content": SPECIAL[1]}, SPECIAL[1]), (None, END_OF_TEXT)],
)
def test_the_end_of_a_text_is_what_the_settings_say(eos, expected, tmp_path):
    write_json(tmp_path, tokenizer=LIBRARYS["GPT-2"], tokenizer_config={"eos_token": eos})
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.end_of_text == tokenizer.special_tokens[expected]


def test_older_files_name_the_end_of_a_text_beside_the_settings(tmp_path):
    write_json(tmp_path, tokenizer=LIBRARYS["GPT-2"], special_tokens_map={"eos_token": SPECIAL[1]})
    write_json(tmp_path, tokenizer_config={"eos_token": None})
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.end_of_text == tokenizer.special_tokens[SPECIAL[1]]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens", {"word": 400 + len(SPECIAL)}),
        ("tokenizer_config", {"added_tokens_decoder": {"5": {"content": "word"}}}),
        ("tokenizer_config", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}),
    ],
)
def test_files_that_contradict_each_other_are_refused(name, content, tmp_path):
    """transformers would add the token, or a space, and have other ids."""
    write_json(tmp_path, tokenizer=LIBRARYS["GPT-2"], **{name: content})
    refuses(tmp_path, "another token, 'word'|add_prefix_space True")


def test_an_added_token_that_would_be_normalized_is_refused(tmp_path):
    content = LIBRARYS["Qwen"]
    token = content["added_tokens"][0] | {"id": 400 + len(SPECIAL), "normalized": True}
    for name in ("<\xe9>", "<e\u0301>"):
        tokens = [*content["added_tokens"], token | {"content": name}]
        refuses(tmp_path, "have to be normalized", content | {"added_tokens": tokens})


# ------------------------------------------------------------------------------------------
# In: vocab.json and merges.txt


def test_words_that_were_added_to_a_vocabulary_are_special_tokens(tmp_path):
    """Their rows of the model were cut off as padding, and nothing said so."""
    write_two_files(tmp_path)
    n = len(json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8")))
    write_json(tmp_path, added_tokens={"word": n})
    assert read_tokenizer(tmp_path).special_tokens["word"] == n


def test_gpt2s_files_of_the_hub_are_gpt2(tiktokens_gpt2, test_data, tmp_path):  # noqa: F811
    shutil.copy(test_data / "gpt2" / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(test_data / "gpt2" / "vocab.bpe", tmp_path / "merges.txt")
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer == BPETokenizer.gpt2(test_data / "gpt2")
    text = "".join([*CORPUS, *SPECIAL])
    assert encode(tokenizer, text) == tiktokens_gpt2.encode(text, allowed_special="all")


@pytest.mark.parametrize("head", [["#version: 0.2"], []])
def test_a_vocabulary_and_its_merges_are_what_the_pipeline_is(head, tmp_path):
    write_two_files(tmp_path, head)
    (tmp_path / "one").mkdir()
    write_json(tmp_path / "one", tokenizer=LIBRARYS["GPT-2"])
    assert read_tokenizer(tmp_path) == read_tokenizer(tmp_path / "one")


def write_two_files(folder, head=()):
    """The same in older files; those of GPT-2 itself leave out the settings."""
    content = LIBRARYS["GPT-2"]
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    named = {str(token["id"]): token for token in content["added_tokens"]}
    write_json(folder, vocab=content["model"]["vocab"] | added)
    write_json(folder, tokenizer_config={"added_tokens_decoder": named})
    lines = [*head, *(" ".join(pair) for pair in content["model"]["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------
# What is refused


def changed(content, path, value):
    """The content with another value at a path of keys."""
    if not path:
        return value(content) if callable(value) else value
    key, *rest = path
    copy = list(content) if isinstance(content, list) else dict(content)
    copy[key] = changed(content[key] if rest or callable(value) else None, rest, value)
    return copy


def without(key, content):
    return {other: content[other] for other in content if other != key}


def split(pattern, behavior="Isolated"):
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": False}


def steps(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
whitespace = {"type": "Whitespace"}


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (("model", "type"), "Unigram", "model has type 'Unigram'"),
        (("model", "type"), "WordPiece", "model has type 'WordPiece'"),
        (("model", "byte_fallback"), True, "byte_fallback True"),
        (("model", "dropout"), 0.1, "dropout 0.1"),
        (("model", "continuing_subword_prefix"), "##", "continuing_subword_prefix"),
        (("model", "end_of_word_suffix"), "</w>", "end_of_word_suffix"),
        (("pre_tokenizer",), {"type": "Metaspace", "replacement": "_"}, "'Metaspace'"),
        (("pre_tokenizer",), steps(), ""),
        (("pre_tokenizer",), steps(split({"Regex": "("}), bytes_only), ""),
        (("pre_tokenizer",), steps(split({"Regex": r"\w+"}), bytes_only), "every character"),
        (("pre_tokenizer",), steps(split({"Regex": "[^a]|(a)"}), bytes_only), "capturing"),
        (("pre_tokenizer",), steps(split({"String": " "}), bytes_only), ""),
        (("pre_tokenizer",), steps(split({"Regex": "."}, "Removed"), bytes_only), "'Removed'"),
        (("pre_tokenizer",), steps(whitespace, bytes_only), "'Whitespace'"),
        (("pre_tokenizer",), steps(split({"Regex": "."}), whitespace, bytes_only), "Whitespace"),
        (("pre_tokenizer", "add_prefix_space"), True, "add_prefix_space True"),
        (("pre_tokenizer", "use_regex"), False, "ByteLevel"),
        (("normalizer",), {"type": "Lowercase"}, "'Lowercase'"),
        (("added_tokens", 0, "lstrip"), True, "endoftext.* lstrip True"),
        (("added_tokens", 0, "rstrip"), True, "endoftext.* rstrip True"),
        (("added_tokens", 0, "single_word"), True, "endoftext.* single_word True"),
        (("added_tokens", 0, "id"), 500, "ids 0 to"),
        (("added_tokens", 0, "id"), "400", "ids 0 to|damaged"),
        (("model", "merges"), lambda merges: merges[::-1], "order"),
        (("model", "merges"), lambda merges: merges[1:], "order"),
        (("model", "merges"), lambda merges: [*merges, ["z", "z"]], "damaged"),
        (("model", "vocab", "~"), 1000, "ids 0 to"),
        (("model", "vocab"), lambda vocab: without("A", vocab), "256 bytes|ids 0 to"),
        (("model", "vocab", "日"), 403, "not made of bytes"),
        *[((key,), value, "") for key in ("model", "added_tokens") for value in (None, 3, "x")],
        *[(("model", key), value, "") for key in ("vocab", "merges") for value in (None, 3, [3])],
        (("model",), lambda model: without("vocab", model), "damaged"),
        ((), lambda content: without("model", content), "damaged"),
        ((), [], "is not a JSON object"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_name(path, value, reason, tmp_path):
    refuses(tmp_path, f"tokenizer.json: .*{reason}", changed(LIBRARYS["GPT-2"], path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model", "vocab"), {"<unk>": 0, "a": 1, "b": 2}),
        (("model", "vocab"), {"b": 0, "a": 1}),
        (("model", "vocab"), {"a": 0, "\ud800": 1}),
        (("model", "unk_token"), "a"),
        (("pre_tokenizer",), split({"Regex": ANY_CHARACTER}, "Removed")),
        (("pre_tokenizer",), split({"Regex": "[a-z]"})),
        (("pre_tokenizer",), steps(split({"Regex": ANY_CHARACTER}), whitespace)),
        (("pre_tokenizer",), whitespace),
        (("normalizer",), {"type": "NFC"}),
        (("added_tokens",), LIBRARYS["GPT-2"]["added_tokens"]),
    ],
)
def test_words_are_not_taken_for_characters(path, value, tmp_path):
    write(CharTokenizer("ab"), tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    refuses(tmp_path, "tokenizer.json: ", changed(content, path, value))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"tokenizer_class": "LlamaTokenizer"}, "LlamaTokenizer"),
        ({"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}, "add_prefix_space True"),
        ({"eos_token": 5}, ""),
        ({"eos_token": "</s>"}, "eos_token '</s>' is none of its tokens"),
        ({"eos_token": {"content": ["a"]}}, ""),
        ([], "is not a JSON object"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(settings, reason, tmp_path):
    write_two_files(tmp_path)
    before = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_json(tmp_path, tokenizer_config=settings and before | settings)
    refuses(tmp_path, f"vocab.json: .*{reason}")


@pytest.mark.parametrize("text", ["", "{", '{"model": "\xff"}', "[" * 100_000, "3", "{}"])
@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "tokenizer_config.json"])
def test_a_damaged_file_is_refused_by_name(name, text, tmp_path):
    write_two_files(tmp_path)
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    refuses(tmp_path, "json: .")


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_vocabulary_with_too_few_merges_is_refused(share, tmp_path):
    """Or ordinary words would become special tokens, which no text has."""
    write_two_files(tmp_path)
    merges = (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    content = "".join(merges[: int(share * len(merges))])
    (tmp_path / "merges.txt").write_text(content, encoding="utf-8")
    refuses(tmp_path, "vocab.json: .")


@pytest.mark.parametrize("merges", ["t h e\n", "t\n", "\xff\n", "Q Q\n"])
def test_damaged_merges_are_refused(merges, tmp_path):
    write_two_files(tmp_path)
    with open(tmp_path / "merges.txt", "ab") as file:
        file.write(merges.encode("latin-1"))
    refuses(tmp_path, "vocab.json: .")


def test_a_vocabulary_without_merges_is_refused(tmp_path):
    write_two_files(tmp_path)
    (tmp_path / "merges.txt").unlink()
    refuses(tmp_path, r"vocab\.json: .*merges\.txt")


def test_a_folder_without_a_tokenizer_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} has no tokenizer"):
        read_tokenizer(tmp_path)


def refuses(folder, reason, content=None):
    """The tokenizer in a folder, maybe with this tokenizer.json, is refused in one line."""
    if content is not None:
        write_json(folder, tokenizer=content)
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


def made(folder):
    folder.mkdir()
    return folder
