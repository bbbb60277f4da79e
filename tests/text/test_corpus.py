"""Laws of the corpora: order and bytes are kept, however large a document is and wherever from."""

import gzip
import io
import json
import os
import re
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nanolm.bpe import GPT2_SPLIT
from nanolm.text import documents as documents_module
from nanolm.text.bpe_tokenizer import BPETokenizer
from nanolm.text.corpus import Corpus, find_corpus
from nanolm.text.documents import Part, documents


def joined(parts: Iterable[Part]) -> list[str]:
    """The documents, their parts put together."""
    texts = [""]
    for text, last, *_ in parts:
        texts[-1] += text
        if last:
            texts.append("")
    *texts, rest = texts
    assert rest == ""  # each document has ended
    return texts


def read(*inputs: str) -> list[str]:
    return joined(find_corpus(inputs).parts())


def read_by_blocks(path: str, block: int, **options: str) -> list[Part]:
    """The parts of a file that is read so many bytes at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "BLOCK", block)
        return list(find_corpus([path], **options).parts())


any_text = st.text(st.characters(exclude_categories=["Cs"]))


@given(texts=st.lists(any_text), limit=st.integers(0, 50))
def test_a_limit_leaves_the_first_bytes_as_far_as_they_are_whole_characters(texts, limit):
    found, data = Corpus("a test", lambda: documents(texts)), "".join(texts).encode()
    assert "".join(found.texts("", limit=limit)) == data[:limit].decode(errors="ignore")
    assert list(found.read("")) == list(found.parts())


# ------------------------------------------------------------------------------------------
# Files and folders


def test_files_are_read_in_the_order_given(workplace):
    for name in "abc":
        Path(name).write_text(f"text {name}")
    assert read("c", "a", "b", "a") == ["text c", "text a", "text b", "text a"]
    assert find_corpus(["c", "a"]).source == "c, a"


def test_a_folder_stands_for_its_text_files_sorted(workplace):
    names = ["f/b.txt", "f/a.md", "f/c/a.RST", "f/c/d/x.y.txt", "f/Z.txt"]
    left_out = ["f/a.py", "f/txt", "f/.hidden.txt", "f/.git/a.txt", "f/c/.d/e.txt"]
    for name in names + left_out:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)
    Path("f/folder.txt").mkdir()
    Path("f/m.JSONL").write_text('{"text": "f/m.JSONL"}')
    in_order = ["f/Z.txt", "f/a.md", "f/b.txt", "f/c/a.RST", "f/c/d/x.y.txt", "f/m.JSONL"]
    assert read("f") == in_order
    assert read("f/a.py", "f/c") == ["f/a.py", "f/c/a.RST", "f/c/d/x.y.txt"]
    assert read("f/.git") == ["f/.git/a.txt"]  # asked for by name


def test_a_corpus_can_be_read_again_and_knows_its_size(workplace):
    Path("a.txt").write_text("caf\u00e9", encoding="utf-8")
    Path("b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    found = find_corpus(["a.txt", "b.jsonl"])
    assert joined(found.parts()) == joined(found.parts()) == ["caf\u00e9", "one", "two"]
    assert found.size == Path("a.txt").stat().st_size + Path("b.jsonl").stat().st_size


def test_an_empty_file_is_no_document(workplace):
    for name in ("a.txt", "b.jsonl"):
        Path(name).touch()
    Path("c.jsonl").write_text('{"text": ""}\n')
    assert read("a.txt", "b.jsonl", "c.jsonl") == []


@pytest.mark.parametrize("block", [1, 2, 2**20])
def test_line_ends_are_kept_and_a_byte_order_mark_is_no_text(workplace, block):
    """Windows' editors begin a file with one; within a text it stays."""
    Path("a.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n\n\xe2\x82\xac\x00\xef\xbb\xbf")
    text = "".join(part.text for part in read_by_blocks("a.txt", block))
    assert text == "a\r\nb\rc\n\n\u20ac\x00\ufeff"
    Path("b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "b"}\n')
    assert read("b.jsonl") == ["b"]
    Path("bad.txt").write_bytes(b"\xef\xbb\xbfab\xff")
    with pytest.raises(ValueError, match=r"not UTF-8 at byte 5 \(0xff\)"):
        read_by_blocks("bad.txt", block)


def test_packed_files_are_read_as_what_is_in_them(workplace):
    Path("f").mkdir()
    for name, data in [("a.txt.gz", b"one"), ("b.JSONL.GZ", b'{"text": "two"}\n{"text": "3"}')]:
        Path("f", name).write_bytes(gzip.compress(data))
    Path("f/c.csv.gz").write_bytes(gzip.compress(b"a,b"))
    assert read("f") == ["one", "two", "3"]
    assert find_corpus(["f"]).size is None  # to know it, one would have to unpack them
    whole = gzip.compress(b"some text" * 99)
    for damaged in (b"no gzip", whole[:-9], whole[:20] + b"\xff" * 9 + whole[29:]):
        Path("d.txt.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"^d\.txt\.gz: no sound packed file"):
            read("d.txt.gz")


def test_other_names_of_lines_of_json_and_of_packed_files_are_known(workplace, monkeypatch):
    """Taken for prose, their braces were learned, too."""
    Path("f").mkdir()
    Path("f/a.ndjson").write_text('{"text": "one"}\n')
    Path("f/b.NDJSON.gz").write_bytes(gzip.compress(b'{"text": "two"}\n'))
    Path("f/c.txt.zst").write_bytes(gzip.compress(b"three"))
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match=r"^f/c\.txt\.zst needs a package: pip install zstandard"):
        read("f")
    monkeypatch.setitem(sys.modules, "zstandard", gzip)  # the same function by the same name
    assert read("f") == ["one", "two", "three"]
    assert find_corpus(["f"]).size is None


def test_a_table_of_parquet_is_its_texts(workplace, hub):
    parquet, pyarrow = (pytest.importorskip(name) for name in ("pyarrow.parquet", "pyarrow"))
    parquet.write_table(pyarrow.table({"text": ["one", "two"], "n": [1, 2]}), "a.parquet")
    assert read("a.parquet") == ["one", "two"]
    parquet.write_table(pyarrow.table({"text": ["one", None]}), "b.parquet")
    with pytest.raises(ValueError, match=r'^b\.parquet: row 2: "text" is None'):
        read("b.parquet")


def test_utf_16_without_a_mark_is_refused_for_its_nuls(workplace):
    """Every second token was one."""
    for coding in ("utf-16-le", "utf-16-be"):
        Path("a.txt").write_text("two little wolves", encoding=coding)
        with pytest.raises(ValueError, match=r"^a\.txt: 17 .* first 34 bytes are NUL, .* UTF-8"):
            read("a.txt")


def test_a_folder_is_read_behind_links_and_what_cannot_be_is_said(workplace, monkeypatch):
    """A third of a text was once gone, without a word."""
    for name in ("f/a.txt", "far/away/b.txt", "f/locked/c.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)
    Path("f/link").symlink_to(Path("far").resolve())
    Path("far/back").symlink_to(Path("f").resolve())  # and round and round
    scandir = os.scandir

    def guarded(path):
        if str(path) == "f/locked":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr("os.scandir", guarded)
    found = find_corpus(["f"])
    assert joined(found.parts()) == ["f/a.txt", "far/away/b.txt"]
    assert found.notes == ("f: 2 text files", "f: skipped 1 unreadable, such as locked")


def test_what_a_folder_holds_and_what_is_left_is_said(workplace):
    """A line for each kind. (Files that nobody may read are like links that lead nowhere.)"""
    for name in ["f/a.txt", "f/b.md", "f/.git/config", "f/.hidden.txt", "f/a.pdf", "f/b/c.csv"]:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)
    Path("f/gone.txt").symlink_to("nowhere")
    assert sorted(find_corpus(["f", "f/a.txt"]).notes) == [
        "f: 2 text files",
        "f: skipped 1 unreadable, such as gone.txt",
        "f: skipped 2 hidden, such as .git/config",
        "f: skipped 2 with another suffix, such as a.pdf",
    ]


@pytest.mark.parametrize("name", ["a.csv", "a.TSV", "a.csv.gz", "a.json"])
def test_a_table_is_not_taken_for_prose(name, workplace):
    """It once was, commas and all, without a word."""
    Path(name).write_text("label,text\n1,hello\n")
    with pytest.raises(
        ValueError, match=rf"^{name} is (a table|JSON): .*\.jsonl file; .* name it \.txt"
    ):
        find_corpus([name])


# ------------------------------------------------------------------------------------------
# Documents in parts


def ends_a_word(left: str, right: str) -> bool:
    """Whether a cut between the two is one between a word and white space."""
    return left[-1:].isalnum() and right[:1].isspace()


scraps = "ab1.' \n\u00e9\u20ac\u3000\U0001f600"


@given(text=st.text(scraps) | st.text(scraps, min_size=60), block=st.integers(1, 9))
def test_a_document_in_parts_is_the_document_cut_where_words_end(text, block, tmp_path):
    """In a part that was cut elsewhere, no word ends before white space."""
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    parts = read_by_blocks(str(path), block)
    assert "".join(part.text for part in parts) == text
    assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True] * bool(text)
    assert all(len(part.text) <= 3 * block for part in parts)
    for part, following in pairwise(parts):
        if not ends_a_word(part.text, following.text):
            assert not any(ends_a_word(*pair) for pair in pairwise(part.text))


GPT4_SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
WORDS = ["the", "wolves", "it's", "We'LL", "1234567", "caf\u00e9", "\u72fc\u7fa4", "snake_case"]
BLANKS = [" ", "  ", "\n", "\r\n", "\n\n\t", "\u3000"]
SIGNS = ["", "(", ".", "'", "--", "\U0001f600"]
prose = st.lists(st.tuples(*map(st.sampled_from, (WORDS, BLANKS, SIGNS))), min_size=1, max_size=30)
TOKENIZERS = [
    BPETokenizer.train([" ".join(WORDS + SIGNS) + "".join(BLANKS)] * 2, 350, pattern=pattern)
    for pattern in (GPT2_SPLIT, GPT4_SPLIT)
]


@given(prose, st.integers(16, 40), st.sampled_from(TOKENIZERS))
def test_the_parts_of_prose_encode_to_what_the_whole_does(tmp_path, prose, block, tokenizer):
    text = "".join("".join(words) for words in prose)
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    parts = read_by_blocks(str(path), block)
    assert all(len(part.text) > block - 16 for part in parts[:-1])  # no word is that long
    assert [i for part in parts for i in tokenizer.encode(part.text)] == tokenizer.encode(text)


@given(
    before=st.text("a\u00e9\u20ac\U0001f600", max_size=9),
    bad=st.sampled_from([b"\xff", b"\xe9", b"\xe2\x82", b"\xf0\x9f\x98"]),
    after=st.sampled_from([b"", b"a", b"\xc3\xa9"]),
    block=st.integers(1, 5),
)
def test_the_byte_that_is_no_utf8_is_named_wherever_blocks_begin(
    before, bad, after, block, workplace
):
    """Also where a character is cut off by the end of the file."""
    Path("bad.txt").write_bytes(before.encode() + bad + after)
    place = rf"{len(before.encode())} \(0x{bad[0]:02x}\)"
    with pytest.raises(ValueError, match=rf"^bad\.txt: not UTF-8 at byte {place}; convert"):
        read_by_blocks("bad.txt", block)


END = "<|endoftext|>"
stories = st.lists(
    st.text("a\n <|", max_size=5) | st.just("many words of a story\r\n" * 3), max_size=5
)


@given(
    stories,
    st.sampled_from([END, "\n\n\n", "|"]),
    st.sampled_from(["", "\n", "\r\n"]),
    st.integers(1, 40),
)
def test_a_separator_ends_a_document_wherever_blocks_begin(tmp_path, texts, separator, end, block):
    """With the end of its own line; and what is blank beside one is no document.

    TinyStories' <|endoftext|> was once text: the token was never learned, and no sample ended.
    """
    path = tmp_path / "a.txt"
    texts = [text.replace(separator, "") for text in texts]
    content = (separator + end).join(texts)
    path.write_bytes(content.encode())
    wanted = re.split(re.escape(separator) + "(?:\r?\n)?", content)
    assume(not any(text.isspace() and len(text) >= block for text in wanted))  # not held back
    parts = read_by_blocks(str(path), block, separator=separator)
    documents = [text for text in wanted if text.strip()] if len(wanted) > 1 else texts
    assert joined(parts) == [text for text in documents if text]
    for part in parts:
        assert part.text[:1] in content.split("\n")[part.line - 1] + "\n"
    assert [part.where for part in parts] == [str(path)] * len(parts)
    assert sum(part.separated for part in parts) >= len(documents) - 1
    assert read(str(path)) == [content] * bool(content)  # nothing separates, unless it is named


def test_a_separator_stands_in_every_kind_of_input(workplace, type_in):
    Path("a.txt").write_text(f"one{END}\ntwo\n{END}\n")
    Path("b.jsonl").write_text(json.dumps({"text": f"three{END}four"}))
    type_in(f"five\n{END}\nsix".encode())
    parts = list(find_corpus(["a.txt", "b.jsonl", "-"], separator=END).parts())
    assert joined(parts) == ["one", "two\n", "three", "four", "five\n", "six"]
    assert [part.separated for part in parts] == [True, True, True, False, True, False]
    assert [part.where for part in parts[1:5]] == [
        "a.txt",
        *["b.jsonl, line 1"] * 2,
        "standard input",
    ]
    assert [part.line for part in parts] == [1, 2, 0, 0, 1, 3]


# ------------------------------------------------------------------------------------------
# Lines of JSON


@given(
    texts=st.lists(any_text),
    ascii_only=st.booleans(),
    between=st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\n"]),
    end=st.sampled_from(["", "\n"]),
)
def test_each_line_of_json_is_a_document(texts, ascii_only, between, end, workplace):
    """Other keys do not matter, nor do blank lines."""
    lines = [json.dumps({"n": 1, "text": text}, ensure_ascii=ascii_only) for text in texts]
    Path("a.jsonl").write_bytes((between.join(lines) + end).encode())
    assert read("a.jsonl") == [text for text in texts if text]


def test_another_key_can_hold_the_text_and_what_is_not_read_is_said_once(workplace):
    Path("a.jsonl").write_text('{"label": 1, "body": "one", "text": ""}\n{"body": "two"}\n')
    found = find_corpus(["a.jsonl"], text_key="body")
    assert joined(found.parts()) == ["one", "two"]
    assert found.notes == ("a.jsonl: only 'body' of each line is read, without label, text",)
    with pytest.raises(ValueError, match=r'line 2: there is no "text" among body: .*--text_key'):
        read("a.jsonl")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"text", r"no JSON \(Expecting value: column 1 \(char 0\)\)"),
        (b'{"text": "a"', r"no JSON \(Expecting ',' delimiter: column 13"),
        (b'{"text": "a"} {"text": "b"}', r"no JSON \(Extra data: column 15"),
        (b'{"text": "a\tb"}', r"no JSON \(Invalid control character at: column 12"),
        (b'{"text": "\xe9"}', r"no JSON \('utf-8' codec can't decode byte 0xe9 in position 10"),
        (b"[" * 100_000, r"no JSON \(maximum recursion depth"),
        (b'"text"', 'needs a JSON object, and is "text"'),
        (b'["text"]', r'needs a JSON object, and is \["text"\]'),
        (b"NaN", "needs a JSON object, and is NaN"),
        (b'{"Text": "a", "b": 1}', 'there is no "text" among Text, b: choose .* --text_key'),
        (b"{}", 'there is no "text" among no keys'),
        (b'{"text": 3}', '"text" is 3, and no text: leave the line out, or .* --text_key'),
        (b'{"text": null, "b": 1}', '"text" is None, and no text: .* another of text, b by'),
        (b'{"text": NaN}', '"text" is nan, and no text'),
        (b'{"text": ["a"]}', r'"text" is \[\'a\'\], and no text'),
        (b'{"text": "\\ud800"}', r"\"text\": '\\ud800' at position 0: halves of surrogate"),
    ],
    ids=lambda part: part[:30].decode("latin-1") if isinstance(part, bytes) else "",
)
def test_what_is_wrong_with_a_line_is_said(line, reason, workplace):
    """Of sixteen kinds it was once one sentence, which was false for three."""
    Path("a.jsonl").write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"^a\.jsonl, line 3: {reason}"):
        read("a.jsonl")


# ------------------------------------------------------------------------------------------
# Standard input


@pytest.fixture
def type_in(monkeypatch, tmp_path):
    """type_in(bytes): what standard input holds. Its copy is closed (else, by the system)."""
    with open(tmp_path / "copy", "w+b") as copy:
        monkeypatch.setattr("tempfile.TemporaryFile", lambda: copy)
        yield lambda data: monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_standard_input_is_one_document_that_can_be_read_again(workplace, type_in):
    type_in(b"caf\xc3\xa9\r\n")
    Path("a.txt").write_text("a")
    found = find_corpus(["a.txt", "-", "a.txt"])
    assert joined(found.parts()) == joined(found.parts()) == ["a", "caf\u00e9\r\n", "a"]
    assert (found.source, found.size) == ("a.txt, standard input, a.txt", 9)


def test_lines_of_json_on_standard_input_are_documents(type_in):
    type_in(b'\n{"text": "one"}\n{"text": "two"}\n')
    found = find_corpus(["-"])
    assert joined(found.parts()) == joined(found.parts()) == ["one", "two"]
    assert found.notes == ("standard input: read as lines of JSON",)


@pytest.mark.parametrize("text", ["[1]\n", '"one"\n', "{\n}", "3\n4\n", ""])
def test_other_texts_on_standard_input_are_prose(text, type_in):
    type_in(text.encode())
    assert (read("-"), find_corpus([]).notes) == ([text] * bool(text), ())


def test_a_line_on_standard_input_without_a_text_is_named(type_in):
    type_in(b'{"text": "one"}\n{"Text": "two"}\n')
    with pytest.raises(ValueError, match=r"^standard input, line 2: there is no .* --text_key"):
        read("-")


def test_standard_input_that_is_no_utf8_is_named(type_in):
    type_in(b"caf\xe9")
    with pytest.raises(ValueError, match=r"standard input: not UTF-8 at byte 3 \(0xe9\)"):
        read("-")


# ------------------------------------------------------------------------------------------
# Datasets of the Hugging Face hub


@pytest.fixture
def hub(workplace, monkeypatch):
    """No network, a cache that goes away, and some datasets in the folders of this place."""
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", workplace / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    for path, key, texts in [
        ("stories/train.jsonl", "text", ["one", "", "two", "three"]),
        ("stories/test.jsonl", "text", ["four"]),
        ("poems/a.jsonl", "verse", ["five"]),
        ("numbers/a.jsonl", "text", [6]),
        ("gaps/a.jsonl", "text", ["seven", None]),
        ("nothing/a.jsonl", "text", []),
        ("program/program.py", "text", []),
    ]:
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text("".join(json.dumps({key: text, "n": 1}) + "\n" for text in texts))
    Path("stories/README.md").write_text(
        "---\nconfigs:\n"
        "- {config_name: all, default: true, data_files: "
        "[{split: train, path: train.jsonl}, {split: test, path: test.jsonl}]}\n"
        "- {config_name: short, data_files: test.jsonl}\n---\n"
    )


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("stories", ["one", "two", "three"]),
        ("stories:short", ["four"]),
        ("stories::test", ["four"]),
        ("stories:all:test", ["four"]),
    ],
)
def test_a_hub_dataset_is_its_texts_in_order_each_time(name, texts, hub):
    found = find_corpus([f"hf:{name}"])
    assert joined(found.parts()) == joined(found.parts()) == texts
    assert (found.source, found.size) == ("hf:stories", None)
    Path("a.txt").write_text("a")
    mixed = find_corpus(["a.txt", f"hf:{name}"])
    assert (joined(mixed.parts()), mixed.size) == (["a", *texts], None)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("poems", 'hf:poems: row 1: there is no "text" among verse, n'),
        ("numbers", 'hf:numbers: row 1: "text" is 6, and no text'),
        ("gaps", 'hf:gaps: row 2: "text" is None, and no text'),
        ("nothing", "hf:nothing: "),
        ("program", "hf:program: .* scripts"),
        ("stories::last", "hf:stories: .* last"),
        ("stories:long", "hf:stories: .* 'long'"),
        ("no/such/folder", "hf:no/such/folder: "),
        ("", "hf:: name a dataset"),
    ],
)
def test_what_a_hub_dataset_lacks_is_named(name, said, hub):
    with pytest.raises(ValueError, match=f"^{said}"):
        read(f"hf:{name}")


def test_without_the_package_its_installation_is_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"hf:stories needs .* pip install datasets"):
        find_corpus(["hf:stories"])
