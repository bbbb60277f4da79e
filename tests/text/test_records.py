"""Laws of labelled texts in files."""

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanolm.text.records import read_records

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1).filter(
    lambda text: text.strip()
)
names = st.sampled_from(["pos", "neg", "3", "-1", "a b"])
words = st.text(st.characters(codec="ascii", categories=("L", "N", "P")), min_size=1).filter(
    lambda word: not word.startswith("-DOCSTART-")
)


def read(path: Path, *, words: bool = False, label_key: str = "label") -> list:
    return read_records([str(path)], words=words, label_key=label_key)


@given(st.lists(st.tuples(texts, names), min_size=1, max_size=5))
def test_a_table_and_lines_of_json_hold_the_same_texts(tmp_path, rows):
    """Whatever is in the texts: commas, quotes, line ends."""
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with open(tmp_path / name, "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, delimiter=delimiter)
            table.writerows([("text", "label"), *rows])
    objects = [json.dumps({"text": text, "label": label}) for text, label in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(objects), encoding="utf-8")
    for name in ("a.csv", "a.tsv", "a.jsonl"):
        found = read(tmp_path / name)
        assert [(record.parts, record.labels) for record in found] == [
            ((text,), (label.strip(),)) for text, label in rows
        ]


def test_two_texts_have_one_label_and_a_label_may_be_a_number_or_have_another_key(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"sentence1": "a", "sentence2": "b", "kind": 7}\n')
    [record] = read(path, label_key="kind")
    assert (record.parts, record.labels) == (("a", "b"), ("7",))


def test_the_word_nan_is_a_text_like_any_other(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nnan,x\nNULL,y\n")
    assert [record.parts for record in read(tmp_path / "a.csv")] == [("nan",), ("NULL",)]


@given(st.lists(st.lists(st.tuples(words, words), min_size=1, max_size=4), min_size=1, max_size=4))
def test_columns_and_lines_of_json_hold_the_same_words(tmp_path, sentences):
    columns = "\n\n".join("\n".join(f"{w} x {t}" for w, t in pairs) for pairs in sentences)
    (tmp_path / "a.conll").write_text(f"-DOCSTART- -X- O\n\n{columns}\n")
    objects = [
        json.dumps({"tokens": [w for w, _ in pairs], "ner_tags": [t for _, t in pairs]})
        for pairs in sentences
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(objects))
    for name in ("a.conll", "a.jsonl"):
        found = read(tmp_path / name, words=True)
        assert [list(zip(r.parts, r.labels, strict=True)) for r in found] == sentences


def test_a_document_of_columns_is_a_source_of_its_own_and_a_word_may_have_no_tag(tmp_path):
    (tmp_path / "a.txt").write_text("-DOCSTART- O\n\na X\n\nb X\n-DOCSTART- O\nc X\n")
    sources = [record.source for record in read(tmp_path / "a.txt", words=True)]
    assert sources == [f"{tmp_path / 'a.txt'}, document {i}" for i in (1, 1, 2)]
    (tmp_path / "a.jsonl").write_text('{"tokens": ["a", "b"], "tags": [null, 4]}')
    assert read(tmp_path / "a.jsonl", words=True)[0].labels == (None, "4")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "text,kind\na,b\n",
            r"line 2: needs text \(or .*has text, kind; another",
        ),
        ("a.csv", "text,label\na,\n", "line 2: the label is '': a name"),
        ("a.csv", "text,label\n ,x\n", "line 2: text is ' ': a text is needed"),
        ("a.csv", "text,label\na,x\nb\n", "line 3: more or fewer columns"),
        ("a.csv", "text,label\na,x,y\n", "line 2: more or fewer columns"),
        ("a.csv", 'text,label\n"a,x\n', r"no sound table \(unexpected end of data\)"),
        ("a.csv", "text,label\n", "there is no labelled text"),
        ("a.jsonl", '{"text": "a", "label": null}', "line 1: the label is None"),
        ("a.jsonl", '{"text": "a", "label": NaN}', "line 1: the label is nan"),
        ("a.jsonl", '{"text": NaN, "label": 1}', "line 1: text is nan: a text is needed"),
        ("a.jsonl", '{"text": "a", "label": 1.5}', "line 1: the label is 1.5"),
        ("a.jsonl", "\n[1]", r"line 2: needs a JSON object, and is \[1\]"),
        ("a.jsonl", '{"text"', r"line 1: no JSON \("),
        ("a.txt", "a", r"labelled texts are read from \.csv, \.tsv and \.jsonl"),
    ],
)
def test_what_is_wrong_with_a_text_is_said_with_its_line(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.conll", "a X\nb\n", "line 2: 1 columns, and not 2 as above"),
        ("a.conll", "a\n", "line 1: 1 columns, and not two: a word and its tag"),
        ("a.conll", "-DOCSTART- O\n", "there is no labelled text"),
        ("a.jsonl", '{"tokens": ["a"], "tags": []}', "needs two lists of one length"),
        ("a.jsonl", '{"tokens": [], "tags": []}', "needs two lists of one length"),
        ("a.jsonl", '{"tokens": "a", "tags": "b"}', "needs two lists of one length"),
        ("a.jsonl", '{"words": ["a"]}', "needs two lists of one length, tokens and tags"),
        ("a.jsonl", '{"tokens": [" "], "tags": ["x"]}', "a text that is not empty"),
    ],
)
def test_what_is_wrong_with_words_is_said_with_their_line(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name, words=True)
