"""Where text comes from: a corpus is a sequence of documents that can be read more than once.

It is read from files, folders, lines of JSON, standard input, or a dataset of the Hugging Face
hub.
"""

import math
import os
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path

from nanolm.system.workers import progress
from nanolm.text.documents import (
    GZIP,
    JSON_LINES,
    Part,
    cut_documents,
    decode_blocks,
    json_lines,
    kind_of,
    opened,
    read_parts,
    text_in,
)

TEXT_SUFFIXES = (".txt", ".md", ".rst", JSON_LINES)
NO_PROSE = {".csv": "a table", ".tsv": "a table", ".json": "JSON"}
STDIN, HUB = "-", "hf:"  # instead of a path


@dataclass(frozen=True)
class Corpus:
    """Documents from somewhere. Each call of parts() reads them anew, in the same order."""

    source: str  # where they come from, in words
    parts: Callable[[], Iterable[Part]]
    size: int | None = None  # about how many bytes they are, where that is known
    notes: tuple[str, ...] = ()  # lines for a person: what was found in a folder, and what is left
    n_files: int = 0  # that are read

    def read(self, label: str, *, limit: float = math.inf) -> Iterator[Part]:
        """The parts, up to limit bytes of text. On a terminal, long work shows a bar."""
        total, seen = (None if self.size is None else min(self.size, limit)), 0
        with progress(total=total, desc=label, unit="B", unit_scale=True) as bar:
            for part in self.parts():
                data = part.text.encode()
                if seen + len(data) > limit:
                    yield Part(data[: limit - seen].decode(errors="ignore"), True)
                    return
                yield part
                seen += len(data)
                bar.update(len(data))

    def texts(self, label: str, *, limit: float = math.inf) -> Iterator[str]:
        """The texts of these parts."""
        return (part.text for part in self.read(label, limit=limit))


def find_corpus(
    inputs: Iterable[str], *, text_key: str = "text", separator: str | None = None
) -> Corpus:
    """The documents of all inputs, in the order given.

    An input is a UTF-8 file, one document; a file of JSON lines (named .jsonl), each an object
    whose text_key holds a document; either of them packed (.gz); a folder, for the files in and
    below it that end in one of TEXT_SUFFIXES, sorted, without hidden ones; "-" for standard input,
    one document; or "hf:NAME[:CONFIG[:SPLIT]]" for a dataset of the Hugging Face hub, or in a
    folder of its format. separator: what stands between documents in any of them.
    Raises FileNotFoundError or ValueError for a file or folder that is not there
    and, on reading, for a dataset that is not and for what is no text.
    """
    return together([find_input(name, text_key, separator) for name in inputs])


def together(corpora: Sequence[Corpus]) -> Corpus:
    """Several corpora as one."""
    sizes = [corpus.size for corpus in corpora]
    return Corpus(
        ", ".join(corpus.source for corpus in corpora),
        lambda: chain.from_iterable(corpus.parts() for corpus in corpora),
        None if None in sizes else sum(sizes),
        tuple(note for corpus in corpora for note in corpus.notes),
        sum(corpus.n_files for corpus in corpora),
    )


def find_input(name: str, text_key: str, separator: str | None) -> Corpus:
    """One input, by the rules of find_corpus."""
    if not name:
        raise ValueError("--input is empty: name a file or a folder")
    if name == STDIN:
        return standard_input(separator)
    if name.startswith(HUB):
        words = name.removeprefix(HUB).split(":", maxsplit=2)
        return hub_dataset(*words, text_key=text_key, separator=separator)
    files, notes = find_text_files(Path(name))
    if dropped := unread_keys(files, text_key):
        notes.append(f"{name}: only {text_key!r} of each line is read, without {dropped}")
    packed = any(file.suffix.lower() == GZIP for file in files)
    return Corpus(
        name,
        lambda: chain.from_iterable(
            read_parts(file, text_key=text_key, separator=separator) for file in files
        ),
        None if packed else sum(file.stat().st_size for file in files),
        tuple(notes),
        len(files),
    )


def find_text_files(path: Path) -> tuple[list[Path], list[str]]:
    """The file itself, or the text files of a folder; and what to say of that."""
    if path.is_file():
        if kind := NO_PROSE.get(kind_of(path)):
            raise ValueError(
                f'{path} is {kind}: write its texts as lines of JSON, {{"text": ...}}, into a '
                f"{JSON_LINES} file; or, to learn its punctuation, too, name it .txt"
            )
        return [path], []
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: no such file or folder; --input takes text files, folders of them, "
            f"{STDIN} for standard input, and {HUB}NAME"
        )
    found = defaultdict(list)
    for file in sorted(path.rglob("*")):
        if not file.is_dir():
            found[why_skipped(file, path)].append(file)
    files = found.pop(None, [])
    if not files:
        raise ValueError(
            f"{path}: no {', '.join(TEXT_SUFFIXES)} file in this folder; name others one by one"
        )
    notes = [f"{path}: {len(files)} text files"]
    notes += [
        f"{path}: skipped {len(skipped)} {reason}, such as {skipped[0].relative_to(path)}"
        for reason, skipped in found.items()
    ]
    return files, notes


def why_skipped(file: Path, folder: Path) -> str | None:
    """Why a file of a folder is not read; None where it is."""
    if any(part.startswith(".") for part in file.relative_to(folder).parts):
        return "hidden"
    if kind_of(file) not in TEXT_SUFFIXES:
        return "with another suffix"
    if not file.is_file() or not os.access(file, os.R_OK):
        return "unreadable"
    return None


def unread_keys(files: Iterable[Path], text_key: str) -> str:
    """The other keys of JSON lines, from the first line of each file."""
    keys = set()
    for file in files:
        if kind_of(file) == JSON_LINES:
            with opened(file) as lines:
                for where, row in islice(json_lines(lines, file), 1):
                    text_in(row, text_key, where)
                    keys.update(row)
    return ", ".join(sorted(keys - {text_key}))


def standard_input(separator: str | None) -> Corpus:
    """What comes from standard input, kept in a temporary file, for it is read twice."""
    if sys.stdin is None:
        raise ValueError("standard input is closed: let a file or a program be its source")
    copy = tempfile.TemporaryFile()  # noqa: SIM115 - the system removes it with the process
    shutil.copyfileobj(sys.stdin.buffer, copy)

    def parts() -> Iterator[Part]:
        copy.seek(0)
        blocks = decode_blocks(copy, "standard input")
        yield from cut_documents(blocks, separator, where="standard input")

    return Corpus("standard input", parts, copy.tell())


def hub_dataset(
    name: str, config: str = "", split: str = "train", *, text_key: str, separator: str | None
) -> Corpus:
    """The texts of a dataset on the Hugging Face hub, or in a folder of its format."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"{HUB}{name} needs the package datasets: pip install datasets") from None
    if "/" not in name and not (name and Path(name).is_dir()):
        raise ValueError(f"{HUB}{name}: name a dataset, {HUB}owner/name, or a folder that exists")

    def parts() -> Iterator[Part]:
        try:
            rows = load_dataset(name, config or None, split=split, streaming=True)
            for number, row in zip(count(1), rows, strict=False):
                text, where = text_in(row, text_key, f"row {number}"), f"{HUB}{name}, row {number}"
                yield from cut_documents([text], separator, where=where, line=0)
        except Exception as error:  # of many kinds, from the hub, from files, from us
            raise ValueError(f"{HUB}{name}: {str(error) or type(error).__name__}") from None

    return Corpus(f"{HUB}{name}", parts)
