"""Where text comes from: a corpus is a sequence of documents that can be read more than once.

It is read from files, folders, lines of JSON, standard input, or a dataset of the Hugging Face
hub.

A document may be larger than the memory, so it comes in parts. They are cut where a word ends and
white space follows: no token of GPT-2's pattern, or of the usual others, reaches over such a
place, and so the parts encode to what the whole would. (Only where a block has no such place at
all is it cut at its end.)
"""

import codecs
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, NamedTuple

from nanolm.system.workers import progress

JSON_LINES = ".jsonl"
TEXT_SUFFIXES = (".txt", ".md", ".rst", JSON_LINES)
STDIN, HUB = "-", "hf:"  # instead of a path
BLOCK = 2**20  # bytes that are read at once, and characters of a part


class Part(NamedTuple):
    """Some text, and whether its document ends with it."""

    text: str
    last: bool


@dataclass(frozen=True)
class Corpus:
    """Documents from somewhere. Each call of parts() reads them anew, in the same order."""

    source: str  # where they come from, in words
    parts: Callable[[], Iterable[Part]]
    size: int | None = None  # about how many bytes they are, where that is known

    def read(self, label: str, *, limit: float = math.inf) -> Iterator[Part]:
        """The parts, up to limit bytes of text. On a terminal, long work shows a bar."""
        total, seen = (None if self.size is None else min(self.size, limit)), 0
        with progress(total=total, desc=label, unit="B", unit_scale=True) as bar:
            for text, last in self.parts():
                data = text.encode()
                if seen + len(data) > limit:
                    yield Part(data[: limit - seen].decode(errors="ignore"), True)
                    return
                yield Part(text, last)
                seen += len(data)
                bar.update(len(data))

    def texts(self, label: str, *, limit: float = math.inf) -> Iterator[str]:
        """The texts of these parts."""
        return (part.text for part in self.read(label, limit=limit))


def documents(texts: Iterable[str]) -> Iterator[Part]:
    """Whole documents; empty ones are none."""
    return (Part(text, True) for text in texts if text)


def find_corpus(inputs: Iterable[str]) -> Corpus:
    """The documents of all inputs, in the order given.

    An input is a UTF-8 file, one document; a file of JSON lines (named .jsonl), each an object
    whose key "text" holds a document; a folder, for the files in and below it that end in one of
    TEXT_SUFFIXES, sorted, without hidden ones; "-" for standard input, one document; or
    "hf:NAME[:CONFIG[:SPLIT]]" for a dataset of the Hugging Face hub, or in a folder of its format.
    Raises FileNotFoundError or ValueError for a file or folder that is not there
    and, on reading, for a dataset that is not and for what is no text.
    """
    corpora = [find_input(name) for name in inputs]
    sizes = [corpus.size for corpus in corpora]
    return Corpus(
        ", ".join(corpus.source for corpus in corpora),
        lambda: chain.from_iterable(corpus.parts() for corpus in corpora),
        None if None in sizes else sum(sizes),
    )


def find_input(name: str) -> Corpus:
    """One input, by the rules of find_corpus."""
    if not name:
        raise ValueError("--input is empty: name a file or a folder")
    if name == STDIN:
        return standard_input()
    if name.startswith(HUB):
        return hub_dataset(*name.removeprefix(HUB).split(":", maxsplit=2))
    files = find_text_files(Path(name))
    return Corpus(
        name,
        lambda: chain.from_iterable(read_parts(file) for file in files),
        sum(file.stat().st_size for file in files),
    )


def find_text_files(path: Path) -> list[Path]:
    """The file itself, or the text files of a folder."""
    if path.is_file():
        return [path]
    if path.exists() and not path.is_dir():
        raise ValueError(
            f"{path}: neither file nor folder; let standard input come from it, for -"
        )
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: no such file or folder; --input takes text files, folders of them, "
            f"{STDIN} for standard input, and {HUB}NAME"
        )
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in TEXT_SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and file.is_file()
    ]
    if not files:
        raise ValueError(
            f"{path}: no {', '.join(TEXT_SUFFIXES)} file in this folder; name others one by one"
        )
    return files


def read_parts(path: Path) -> Iterator[Part]:
    """The documents of a file."""
    with open(path, "rb") as file:
        if path.suffix.lower() == JSON_LINES:
            yield from documents(json_lines(file, path))
        else:
            yield from cut_document(decode_blocks(file, path))


def read_text(path: Path) -> str:
    """A whole file as text, line ends as they are. Raises ValueError where it is not UTF-8."""
    with open(path, "rb") as file:
        return "".join(decode_blocks(file, path))


def decode_blocks(file: IO[bytes], name: object) -> Iterator[str]:
    """The text of a file, block by block. Raises ValueError where it is not UTF-8."""
    decoder, start = codecs.getincrementaldecoder("utf-8")(), 0
    while True:
        block = file.read(BLOCK)
        waiting = len(decoder.getstate()[0])  # the bytes of a character that is not complete
        try:
            yield decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name}: not UTF-8 at byte {start - waiting + error.start} "
                f"(0x{error.object[error.start]:02x}); convert the file to UTF-8, or leave it out"
            ) from None
        if not block:
            return
        start += len(block)


def cut_document(blocks: Iterable[str]) -> Iterator[Part]:
    """A document in parts of about a block, each cut where a word ends."""
    text, begun = "", False
    for block in blocks:
        text += block
        if len(text) >= BLOCK:
            cut = end_of_a_word(text)
            yield Part(text[:cut], False)
            text, begun = text[cut:], True
    if text or begun:
        yield Part(text, True)


def end_of_a_word(text: str) -> int:
    """Where the last word ends that white space follows; the end of the text, where none does."""
    for i in range(len(text) - 1, 0, -1):
        if text[i].isspace() and text[i - 1].isalnum():
            return i
    return len(text)


def json_lines(file: Iterable[bytes], name: object) -> Iterator[str]:
    """The key "text" of each line's JSON object. Raises ValueError where a line has none."""
    for number, line in enumerate(file, start=1):
        if line.isspace():
            continue
        try:
            text = json.loads(line.decode())["text"]
            text.encode()  # JSON can spell half a surrogate pair, which is no character
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise ValueError(
                f'{name}, line {number}: each line must be a JSON object whose key "text" holds '
                "a string"
            ) from None
        yield text


def standard_input() -> Corpus:
    """What comes from standard input, kept in a temporary file, for it is read twice."""
    if sys.stdin is None:
        raise ValueError("standard input is closed: let a file or a program be its source")
    copy = tempfile.TemporaryFile()  # noqa: SIM115 - the system removes it with the process
    shutil.copyfileobj(sys.stdin.buffer, copy)

    def parts() -> Iterator[Part]:
        copy.seek(0)
        yield from cut_document(decode_blocks(copy, "standard input"))

    return Corpus("standard input", parts, copy.tell())


def hub_dataset(name: str, config: str = "", split: str = "train") -> Corpus:
    """The key "text" of a dataset on the Hugging Face hub, or in a folder of its format."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"{HUB}{name} needs the package datasets: pip install datasets") from None
    if "/" not in name and not (name and Path(name).is_dir()):
        raise ValueError(f"{HUB}{name}: name a dataset, {HUB}owner/name, or a folder that exists")

    def texts() -> Iterator[str]:
        try:
            for row in load_dataset(name, config or None, split=split, streaming=True):
                if not isinstance(row.get("text"), str):
                    raise ValueError(f'a row has no text under "text", but {list(row)}')
                yield row["text"]
        except Exception as error:  # of many kinds, from the hub, from files, from us
            raise ValueError(f"{HUB}{name}: {str(error) or type(error).__name__}") from None

    return Corpus(f"{HUB}{name}", lambda: documents(texts()))
