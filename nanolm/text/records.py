"""Labelled texts in files: one label for a text, or one for each of its words.

A text, or a pair of them, with its label is a row of a table (.csv, .tsv, with a first line of
names) or a JSON object of a line (.jsonl). Words with their tags are a JSON object with two lists,
or stand one to a line in columns, as since the shared task of CoNLL 2003: the word first, its tag
last, an empty line after each sentence, -DOCSTART- before each document.

Whatever is wrong with a line is said with its number.
"""

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nanolm.text.documents import JSON_LINES, json_object, kind_of, read_text

TABLES = {".csv": ",", ".tsv": "\t"}  # what separates the columns
TEXT_KEYS = (("text",), ("sentence1", "sentence2"))
WORD_KEYS = (("tokens", "tags"), ("tokens", "ner_tags"), ("words", "tags"))


class Record(NamedTuple):
    """A labelled text."""

    parts: tuple[str, ...]  # the text; or two; or its words
    labels: tuple[str | None, ...]  # its label; or one for each word, None where there is none
    source: str  # the file or document, for texts of one belong together
    where: str  # file and line, for people


def read_records(paths: Iterable[str], *, words: bool, label_key: str) -> list[Record]:
    """The records of all files. words: whether each word has a label. Raises ValueError."""
    read = word_records if words else text_records
    records = [record for path in paths for record in read(Path(path), label_key)]
    if not records:
        raise ValueError(f"{', '.join(paths)}: there is no labelled text")
    return records


def text_records(path: Path, label_key: str) -> Iterator[Record]:
    """One label for each text of a file, or for each pair."""
    for where, row in rows_of(path):
        keys = next((keys for keys in TEXT_KEYS if set(keys) <= row.keys()), None)
        if keys is None or label_key not in row:
            raise ValueError(
                f"{where}: needs text (or sentence1, sentence2) and {label_key}, and has "
                f"{', '.join(map(str, row))}; another label is chosen by --label_key"
            )
        for key in keys:
            if not isinstance(row[key], str) or not row[key].strip():
                raise ValueError(f"{where}: {key} is {row[key]!r}: a text is needed; leave it out")
        labels = (label_of(row[label_key], where),)
        yield Record(tuple(row[key] for key in keys), labels, str(path), where)


def label_of(value: Any, where: str) -> str:
    """A label's name. Raises ValueError for what is neither a text nor a whole number."""
    if not isinstance(value, (str, int)) or not str(value).strip():
        raise ValueError(f"{where}: the label is {value!r}: a name or a whole number is needed")
    return str(value).strip()


def rows_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table, or the objects of JSON lines, each with its file and line."""
    kind, lines = kind_of(path), io.StringIO(read_text(path), newline="")
    if kind == JSON_LINES:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}, line {number}", json_object(line, f"{path}, line {number}")
    elif kind in TABLES:
        table = csv.DictReader(lines, delimiter=TABLES[kind], strict=True)
        for row in checked_rows(table, path):
            if None in row or None in row.values():
                raise ValueError(f"{path}, line {table.line_num}: more or fewer columns")
            yield f"{path}, line {table.line_num}", row
    else:
        raise ValueError(f"{path}: labelled texts are read from .csv, .tsv and {JSON_LINES}")


def checked_rows(table: csv.DictReader, path: Path) -> Iterator[dict]:
    """The rows of a table. Raises ValueError where it is none."""
    try:
        yield from table
    except csv.Error as error:
        raise ValueError(f"{path}, line {table.line_num}: no sound table ({error})") from None


def word_records(path: Path, label_key: str) -> Iterator[Record]:
    """One label for each word of the sentences of a file."""
    if kind_of(path) != JSON_LINES:
        yield from column_records(path)
        return
    for where, row in rows_of(path):
        keys = next((keys for keys in WORD_KEYS if set(keys) <= row.keys()), None)
        words, tags = (row[key] for key in keys) if keys else (None, None)
        lists = isinstance(words, list) and isinstance(tags, list)
        if not lists or not len(words) == len(tags) > 0:
            raise ValueError(
                f"{where}: needs two lists of one length, tokens and tags, and has "
                f"{', '.join(map(str, row))}"
            )
        if not all(isinstance(word, str) and word.strip() for word in words):
            raise ValueError(f"{where}: each of tokens has to be a text that is not empty")
        labels = tuple(None if tag is None else label_of(tag, where) for tag in tags)
        yield Record(tuple(words), labels, str(path), where)


def column_records(path: Path) -> Iterator[Record]:
    """The sentences of a file of columns."""
    rows, width, document = [], None, 0
    for number, line in enumerate([*read_text(path).splitlines(), ""], start=1):
        columns, where = line.split(), f"{path}, line {number}"
        if columns and not columns[0].startswith("-DOCSTART-"):
            width = width or len(columns)
            if len(columns) != width or width < 2:
                wanted = f"{width} as above" if width > 1 else "two: a word and its tag"
                raise ValueError(f"{where}: {len(columns)} columns, and not {wanted}")
            rows.append((columns[0], columns[-1]))
            continue
        if rows:
            words, tags = zip(*rows, strict=True)
            yield Record(words, tags, f"{path}, document {document}", where)
            rows = []
        document += bool(columns)
