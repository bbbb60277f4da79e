"""Laws of the tokenizers."""

import hashlib
import json
import re
import unicodedata
from pathlib import Path
from unittest.mock import Mock

import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from nanolm.bpe import GPT2_SPLIT, LONGEST_BLANK, N_BYTES, learn_merges_naive, split, tokens_of
from nanolm.text.bpe_tokenizer import END_OF_TEXT, BPETokenizer
from nanolm.text.char_tokenizer import CharTokenizer
from nanolm.text.data import open_dataset
from nanolm.text.tokenizer import TOKENIZER_FILE, load_tokenizer, stream_text

GPT4_SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL = [END_OF_TEXT, "<|end of\n\n line|>", ".*"]
CORPUS = [
    "They're the wolves that met 1024 foxes, and the foxes' wolves weren't theirs.\n\n\n  The",
    "Ελληνικά, по-русски, 日本語で, हिन्दी में, بالعربية, 🙂🙃🙂 e\u0301e\u0301\u00a0\u017f ",
    "aaaaaaaaaaaaaaaa                \r\n\r\n\n\n\n\n\t\t11111111........",
]
BPE_TOKENIZERS = {
    "bytes": BPETokenizer.train([], N_BYTES + 3, special_tokens=SPECIAL),
    "GPT-2": BPETokenizer.train(CORPUS, 400, special_tokens=SPECIAL),
    "GPT-4": BPETokenizer.train(CORPUS, 400, special_tokens=SPECIAL, pattern=GPT4_SPLIT),
    "whole": BPETokenizer.train(CORPUS, 400, special_tokens=SPECIAL, pattern=r"(?s:.+)"),
    "letters": BPETokenizer.train(CORPUS, 300, special_tokens=SPECIAL, pattern=r"[a-z]+"),
}
every_bpe = pytest.mark.parametrize("tokenizer", BPE_TOKENIZERS.values(), ids=BPE_TOKENIZERS)


def texts_without(*categories):
    """Texts of words that the tokenizers know, special tokens, and any other characters."""
    known = [*SPECIAL, *" ".join(CORPUS).split(" "), *"\n\r\t ", "  ", "aaaa", "'ll"]
    others = st.text(st.characters(exclude_categories=categories))
    return st.lists(st.sampled_from(known) | others).map("".join)


texts = texts_without("Cs")  # every str but lone surrogates
# regex knows a newer Unicode than bare tiktoken, whose letters and numbers are then fewer.
assigned_texts = texts_without("Cs", "Cn")
allowed = st.sampled_from([(), [END_OF_TEXT], {*SPECIAL}, "all"])


# ------------------------------------------------------------------------------------------
# Characters


@given(texts)
def test_decoding_inverts_encoding(text):
    tokenizer = CharTokenizer.train([text])
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert len(ids) == len(text)


@given(st.lists(texts, min_size=1))
def test_the_alphabet_does_not_depend_on_the_order_of_the_texts(texts):
    tokenizer = CharTokenizer.train(texts)
    assert tokenizer == CharTokenizer.train(reversed(texts))
    assert tokenizer.characters == sorted(set("".join(texts)))


@given(texts)
def test_a_stream_decodes_to_the_same_text_as_the_whole(text):
    tokenizer = CharTokenizer.train([text])
    assert "".join(stream_text(tokenizer, tokenizer.encode(text))) == text


@settings(max_examples=20)
@given(text=texts)
def test_a_saved_tokenizer_is_loaded_equal(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.json"
    tokenizer = CharTokenizer.train([text])
    tokenizer.save(path)
    assert load_tokenizer(path) == tokenizer
    assert load_tokenizer(path).encode(text) == tokenizer.encode(text)


def test_tokenizers_of_other_alphabets_differ():
    assert CharTokenizer("ab") != CharTokenizer("abc")


def test_an_unknown_character_is_named_with_its_place():
    with pytest.raises(ValueError, match=r"'é' \(U\+00E9\), at position 2, .* only 'abc'"):
        CharTokenizer("abc").encode("abé")


def test_no_more_than_forty_characters_of_an_alphabet_are_shown():
    """Of Chinese ones there were once 9 kB."""
    with pytest.raises(ValueError, match=r"only '[\u4e00-\u4e27]{40}' and 2,960 more$"):
        CharTokenizer(map(chr, range(0x4E00, 0x4E00 + 3000))).encode("a")


# ------------------------------------------------------------------------------------------
# Byte pair encoding: to ids, and back


@every_bpe
@given(text=texts, allowed=allowed)
def test_every_text_survives_its_encoding(tokenizer, text, allowed):
    ids = tokenizer.encode(text, allowed_special=allowed)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()


@every_bpe
@given(text=assigned_texts, allowed=allowed)
def test_encode_gives_what_the_textbook_and_bare_tiktoken_give(tokenizer, text, allowed):
    ids = tokenizer.encode(text, allowed_special=allowed)
    assert ids == tokenizer.encode_naive(text, allowed_special=allowed)
    assert ids == bare_tiktoken(tokenizer, text, allowed)


@pytest.mark.parametrize(
    "pattern", [GPT2_SPLIT, GPT4_SPLIT, r"\P{L}+|\p{L}+"], ids=["GPT-2", "GPT-4", "not"]
)
def test_the_textbook_decides_which_new_characters_are_letters(pattern):
    """Of 17,144 that tiktoken does not know, the ids were once others than those learned."""
    letters = [chr(i) for i in range(0x10000, 0x40000, 29)]
    ranks = {bytes([i]): i for i in range(N_BYTES)}
    ranks |= {bytes([0x80 + i]) + b"a": N_BYTES + i for i in range(64)}  # a character's end, and a
    ranks[b"1 "] = len(ranks)
    tokenizer = BPETokenizer(ranks, pattern=pattern)
    text = "".join(f" {letter}a1" for letter in letters)
    assert tokenizer.encode(text) == tokenizer.encode_naive(text)


@pytest.mark.parametrize(
    "run",
    [" " * 10**6, "\n  \n" * 250_000, "a" * 10**5, "1" * 10**5],
    ids=["spaces", "lines", "letters", "digits"],
)
def test_a_run_without_end_is_encoded_as_the_textbook_does(run):
    """tiktoken alone gives up at a million blanks."""
    tokenizer, text = BPE_TOKENIZERS["GPT-2"], f"{run}the {run[:30_000]}end"
    ids = tokenizer.encode(text)
    assert ids == tokenizer.encode_naive(text)
    assert tokenizer.decode(ids) == text


def test_white_space_is_encoded_apart_only_where_it_is_too_long():
    tokenizer, blank = BPE_TOKENIZERS["GPT-2"], " " * (LONGEST_BLANK - 1)
    assert tokenizer.encode(blank + "the") == bare_tiktoken(tokenizer, blank + "the")
    apart = bare_tiktoken(tokenizer, blank + " ") + bare_tiktoken(tokenizer, "the")
    assert tokenizer.encode(blank + " the") == apart


@given(texts, st.text(st.characters(categories=["Cs"]), min_size=1, max_size=2), texts)
@example("", "\ud83d\udc4d", "")
def test_halves_of_surrogate_pairs_are_refused_with_their_place(before, halves, after):
    """Also two that belong together: a pair was once called half a pair."""
    said = f"^{re.escape(repr(halves))} at position {len(before)}: halves of surrogate pairs"
    for encode in (BPE_TOKENIZERS["GPT-2"].encode, BPE_TOKENIZERS["GPT-2"].encode_naive):
        with pytest.raises(ValueError, match=said):
            encode(before + halves + after)


@every_bpe
@given(content=st.binary())
def test_any_bytes_can_be_said_and_are_decoded(tokenizer, content):
    assert tokenizer.decode_bytes(content) == content  # a byte is its own id


@every_bpe
@given(data=st.data())
def test_ids_stream_to_the_text_of_their_joined_bytes(tokenizer, data):
    """Also ids that no text has: the parts of a character, torn and in any order."""
    parts = [*"é€😀\ud800a".encode("utf-8", "surrogatepass")]
    any_id = st.sampled_from(parts) | st.integers(0, tokenizer.vocab_size - 1)
    ids = data.draw(st.lists(any_id))
    texts = {i: text for text, i in tokenizer.ranks.items()}
    texts |= {i: text.encode() for text, i in tokenizer.special_tokens.items()}
    assert tokenizer.decode_bytes(ids) == b"".join(texts[i] for i in ids)
    assert "".join(stream_text(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_spanning_tokens_is_streamed_when_it_is_complete():
    tokenizer = BPE_TOKENIZERS["bytes"]
    pieces = list(stream_text(tokenizer, tokenizer.encode("aé€😀")))
    assert [piece for piece in pieces if piece] == ["a", "é", "€", "😀"]
    assert "".join(stream_text(tokenizer, "é".encode()[:1])) == "\ufffd"


@pytest.mark.parametrize("tokenizer", [CharTokenizer("abc"), BPE_TOKENIZERS["bytes"]])
def test_an_id_outside_the_vocabulary_is_named(tokenizer):
    for i in (-1, tokenizer.vocab_size):
        for decode in (tokenizer.decode, tokenizer.decode_bytes):
            with pytest.raises(
                ValueError, match=f"id {i} .* vocabulary of {tokenizer.vocab_size}"
            ):
                decode([0, i])


# ------------------------------------------------------------------------------------------
# Special tokens


@given(st.data(), st.lists(st.text(" \n(.", min_size=1, max_size=3), min_size=1))
def test_the_longest_allowed_special_token_is_one_id_and_the_rest_is_data(data, names):
    text = data.draw(st.lists(st.sampled_from([*names, "a"])).map("".join))
    ids = {name: N_BYTES + i for i, name in enumerate(dict.fromkeys(names))}  # each once
    tokenizer = BPETokenizer.train([], N_BYTES + len(ids), special_tokens=names)
    allowed = data.draw(st.sets(st.sampled_from(names)))
    expected, rest = [], text
    while rest:
        here = max(filter(rest.startswith, allowed), key=len, default=None)
        expected.append(ids[here] if here else ord(rest[0]))
        rest = rest.removeprefix(here or rest[0])
    assert tokenizer.special_tokens == ids
    assert tokenizer.encode(text, allowed_special=allowed) == expected


def test_a_special_token_that_does_not_exist_is_named():
    tokenizer = BPE_TOKENIZERS["GPT-2"]
    for encode in (tokenizer.encode, tokenizer.encode_naive):
        with pytest.raises(ValueError, match=r"'<\|other\|>'.*<\|endoftext\|>"):
            encode("text", allowed_special=[END_OF_TEXT, "<|other|>"])


# ------------------------------------------------------------------------------------------
# Normal forms

# Characters, and marks that come in several orders and combine with what is before them.
marked = st.text([*"aeA \n", "\u0301", "\u0323", *"\u00e9\u212b\ufb01\uac00<|"])


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
@settings(max_examples=30)
@given(text=st.lists(marked | texts | st.sampled_from(SPECIAL)).map("".join))
def test_encoding_brings_a_text_to_its_normal_form_and_leaves_special_tokens(form, text):
    learned = BPE_TOKENIZERS["GPT-2"]
    tokenizer = BPETokenizer(learned.ranks, learned.special_tokens, normal_form=form)
    ids = tokenizer.encode(text)
    assert ids == tokenizer.encode_naive(text) == learned.encode(unicodedata.normalize(form, text))
    assert tokenizer.decode(ids) == tokenizer.normalize(text)
    kept = text.split(END_OF_TEXT)
    expected = [learned.encode(tokenizer.normalize(part)) for part in kept]
    parts = tokenizer.encode(text, allowed_special=[END_OF_TEXT])
    assert parts == [*expected[0], *(i for e in expected[1:] for i in [tokenizer.end_of_text, *e])]


def test_prepare_counts_the_bytes_of_the_normalized_text(workplace, run_main):
    """It compares what it writes with the text, which must not fail where the text changes."""
    text = "Ae\u0301 \u212b \ufb01 e\u0301\u0323\n" * 40
    (workplace / "text.txt").write_text(text, encoding="utf-8")
    for form in ("NFC", "NFKD"):
        tokenizer = BPETokenizer(AB.ranks, AB.special_tokens, normal_form=form)
        tokenizer.save(workplace / "t.json")
        flags = "--input", "text.txt", "--tokenizer=t.json"
        code, _, errors = run_main("prepare", form, *flags)
        assert code == 0, errors
        dataset = open_dataset(form)
        ids = list(map(int, [*dataset.train, *dataset.val]))
        assert dataset.tokenizer == tokenizer
        written = tokenizer.decode(ids).replace(END_OF_TEXT, "")
        assert written == unicodedata.normalize(form, text) != text
        sizes = [dataset.meta[split]["bytes"] for split in ("train", "val")]
        assert sum(sizes) == len(written.encode())
        assert run_main("prepare", form, "--check")[0] == 0


# ------------------------------------------------------------------------------------------
# Training


def test_a_vocabulary_is_the_bytes_then_the_merges_then_the_special_tokens():
    tokenizer = BPETokenizer.train(["aaabdaaabac"], 261, special_tokens=["x", END_OF_TEXT])
    assert list(tokenizer.ranks)[N_BYTES:] == [b"aa", b"ab", b"aaab"]
    assert list(tokenizer.ranks.values()) == list(range(259))
    assert tokenizer.special_tokens == {"x": 259, END_OF_TEXT: tokenizer.end_of_text}
    assert (tokenizer.vocab_size, tokenizer.name) == (261, "bpe:261")
    assert BPETokenizer.train([], 257, special_tokens=["x"]).end_of_text is None


@every_bpe
def test_training_is_textbook_learning_from_the_pieces_of_the_texts(tokenizer):
    pieces = [piece for text in CORPUS for piece in split(text, tokenizer.pattern)]
    merges = learn_merges_naive(pieces, len(tokenizer.ranks) - N_BYTES)
    assert list(tokenizer.ranks) == tokens_of(merges)


def test_training_does_not_depend_on_the_order_of_the_texts():
    """Each has words that no other text has."""
    texts = [f" {word} {word * 2}" * 9 for word in ["one", "two", "three"]]
    tokenizer = BPETokenizer.train(texts, 290)
    assert BPETokenizer.train(reversed(texts), 290) == tokenizer
    assert all(len(tokenizer.encode(word)) == 1 for word in [" one", " two", " three"])


@pytest.mark.parametrize(("texts", "n"), [([], 256), ([""], 256), (["a"], 256), (["aaa"], 258)])
def test_a_text_too_small_for_the_vocabulary_is_learned_whole_and_says_so(texts, n, capsys):
    tokenizer = BPETokenizer.train(texts, 300)
    assert capsys.readouterr().err.startswith("warning: the text has no more pairs to merge")
    assert (len(tokenizer.ranks), tokenizer.vocab_size) == (n, n + 1)
    assert BPETokenizer.train(texts, n + 1) == tokenizer
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((["abc"], 257), "vocab_size=257: choose at least 258"),
        ((["abc"], 2**21), "and at most"),
        ((["abc"], 300.5), r"vocab_size=300\.5"),
        (("abc", 300), r"one string: give a list, \[text\]"),
    ],
)
def test_training_refuses_what_it_cannot_do(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        BPETokenizer.train(*arguments, special_tokens=["x", "y"])


def test_600_tokens_halve_tiny_shakespeare_in_any_order_of_its_lines(test_data):
    text = (test_data / "tinyshakespeare.txt").read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    tokenizer = BPETokenizer.train(lines, 600)
    assert len(text.encode()) / len(tokenizer.encode(text)) > 2
    assert BPETokenizer.train(sorted(lines), 600) == tokenizer


# ------------------------------------------------------------------------------------------
# Files


@every_bpe
@pytest.mark.parametrize("place", ["t.json", "."])
def test_a_loaded_tokenizer_encodes_as_the_saved_one(tokenizer, place, tmp_path):
    tokenizer.save(tmp_path / (TOKENIZER_FILE if place == "." else place))
    loaded = load_tokenizer(tmp_path / place)
    text = "".join([*CORPUS, *SPECIAL])
    for allowed in [(), "all"]:
        ids = tokenizer.encode(text, allowed_special=allowed)
        assert loaded.encode(text, allowed_special=allowed) == ids
        assert loaded.decode(ids) == text
    assert (loaded, loaded.name) == (tokenizer, tokenizer.name)


AB = BPETokenizer.train(["ab"], 258)


def test_tokenizers_that_encode_differently_differ():
    tokenizers = [
        BPETokenizer.train(["ab"], 258),
        BPETokenizer.train(["cd"], 258),
        BPETokenizer.train(["ab"], 258, special_tokens=["x"]),
        BPETokenizer.train(["ab"], 258, pattern=r"\w+"),
        BPETokenizer(AB.ranks, AB.special_tokens, end_token="x"),
        BPETokenizer(AB.ranks, AB.special_tokens, normal_form="NFC"),
        BPETokenizer(AB.ranks, AB.special_tokens, normal_form="NFD"),
        CharTokenizer("ab"),
    ]
    assert all((a == b) == (a is b) for a in tokenizers for b in tokenizers)


@pytest.mark.parametrize("options", [{"end_token": ".*"}, {"normal_form": "NFKD"}])
def test_the_end_of_a_text_and_the_normal_form_are_saved(options, tmp_path):
    learned = BPE_TOKENIZERS["GPT-2"]
    tokenizer = BPETokenizer(learned.ranks, learned.special_tokens, **options)
    tokenizer.save(tmp_path / "t.json")
    loaded = load_tokenizer(tmp_path / "t.json")
    assert loaded == tokenizer != learned
    assert loaded.end_of_text == tokenizer.special_tokens[options.get("end_token", END_OF_TEXT)]
    assert loaded.encode("e\u0301\u00e9") == tokenizer.encode("e\u0301\u00e9")


BYTES = {chr(byte): byte for byte in range(N_BYTES)}
GOOD = {"format": 1, "kind": "bpe", "name": "good", "pattern": r"\w+"}
GOOD |= {"special_tokens": {"x": 256}, "ranks": BYTES}


def test_a_file_of_this_form_is_read(tmp_path):
    (tmp_path / "t.json").write_text(json.dumps(GOOD))
    expected = BPETokenizer.train([], 257, special_tokens=["x"], pattern=r"\w+")
    assert load_tokenizer(tmp_path / "t.json") == expected


def test_a_file_of_this_form_is_older_than_the_other_options(tmp_path):
    assert not {"end_token", "normal_form"} & set(GOOD)
    (tmp_path / "t.json").write_text(json.dumps(GOOD))
    tokenizer = load_tokenizer(tmp_path / "t.json")
    assert (tokenizer.end_token, tokenizer.normal_form) == (END_OF_TEXT, None)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=rf"{TOKENIZER_FILE} is missing"):
        load_tokenizer(tmp_path)


def test_a_file_that_cannot_be_read_is_not_said_to_be_no_tokenizer(tmp_path, monkeypatch):
    (tmp_path / TOKENIZER_FILE).touch()
    monkeypatch.setattr(Path, "read_bytes", Mock(side_effect=PermissionError(13, "Denied")))
    with pytest.raises(ValueError, match=rf"{TOKENIZER_FILE} cannot be read: Denied$"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        *["", "{", "[]", "{}", "[" * 100_000, "\ud800"],
        *[{"format": 1, "kind": kind, "characters": "ab"} for kind in ("other", ["char"], "bpe")],
        {"format": 1, "kind": "char", "characters": 3},
        {"format": 2, "kind": "char", "characters": "ab"},
        *[{key: GOOD[key] for key in GOOD if key != missing} for missing in GOOD],
        *[GOOD | {"pattern": pattern} for pattern in (3, None, [], "(", "(a)", "a*")],
        *[GOOD | {"ranks": ranks} for ranks in (None, [], {}, list(BYTES), "ranks")],
        *[GOOD | {"ranks": BYTES | {"a": i}} for i in (0, -1, 97.0, "97", None, True)],
        *[GOOD | {"ranks": BYTES | new} for new in ({"ab": 258}, {"ab": 256}, {"\u0100": 257})],
        GOOD | {"ranks": {"ab": 0} | {chr(i): i for i in range(1, N_BYTES)}},  # no byte 0
        *[GOOD | {"special_tokens": names} for names in (["x"], {"x": 255}, {"": 256}, "x", 3)],
        GOOD | {"special_tokens": {"\ud800": 256}},
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused_by_name(content, tmp_path):
    content = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "t.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"t\.json is no tokenizer.*: name the folder of"):
        load_tokenizer(tmp_path / "t.json")


# ------------------------------------------------------------------------------------------
# GPT-2's vocabulary


@pytest.fixture(scope="module")
def gpt2(test_data):
    return BPETokenizer.gpt2(test_data / "gpt2")


@pytest.fixture(scope="module")
def tiktokens_gpt2(test_data, tmp_path_factory):
    """tiktoken's own, which finds the files in its cache and has no need of the network."""
    cache = tmp_path_factory.mktemp("cache")
    for name in ("encoder.json", "vocab.bpe"):
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        content = (test_data / "gpt2" / name).read_bytes()
        (cache / hashlib.sha1(url.encode()).hexdigest()).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        yield tiktoken.Encoding(**openai_public.gpt2())


def test_gpt2_comes_from_a_folder_or_through_tiktoken(gpt2, tiktokens_gpt2, test_data, tmp_path):
    assert (gpt2.name, gpt2.vocab_size, gpt2.end_of_text) == ("gpt2", 50257, 50256)
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2 == BPETokenizer.gpt2() == load_tokenizer(test_data / "gpt2")
    assert gpt2 == load_tokenizer(test_data / "gpt2" / "encoder.json")
    gpt2.save(tmp_path / TOKENIZER_FILE)
    (tmp_path / "encoder.json").write_text("")  # a file of our own goes before
    assert load_tokenizer(tmp_path) == gpt2


def test_gpt2_encodes_tiny_shakespeare_as_tiktoken_does(gpt2, tiktokens_gpt2, test_data):
    text = (test_data / "tinyshakespeare.txt").read_text(encoding="utf-8")
    assert gpt2.encode(text) == tiktokens_gpt2.encode(text)


@given(text=assigned_texts)
def test_gpt2_encodes_every_text_as_tiktoken_does(gpt2, tiktokens_gpt2, text):
    ids = gpt2.encode(text, allowed_special="all")
    assert ids == tiktokens_gpt2.encode(text, allowed_special="all")
    assert ids == gpt2.encode_naive(text, allowed_special="all")


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_folder_without_gpt2s_own_vocabulary_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "encoder.json").write_text(content)
    with pytest.raises(ValueError, match=r"GPT-2's vocabulary .*encoder\.json"):
        BPETokenizer.gpt2(tmp_path)


def test_without_network_one_is_told_where_else_gpt2_can_come_from(tmp_path, monkeypatch):
    def fail(url):
        raise OSError("no network")

    monkeypatch.setattr("tiktoken.load.read_file", fail)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=r"no network.* folder .*encoder\.json"):
        BPETokenizer.gpt2()


def bare_tiktoken(tokenizer, text, allowed=()):
    """What tiktoken gives without any help but a pattern that misses no character."""
    encoding = tiktoken.Encoding(
        "bare",
        pat_str=tokenizer.pattern + "|(?s:.)",
        mergeable_ranks=tokenizer.ranks,
        special_tokens=tokenizer.special_tokens,
    )
    allowed = allowed if allowed == "all" else set(allowed)
    return encoding.encode(text, allowed_special=allowed, disallowed_special=())
