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
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path

from nanolm.system.workers import progress
from nanolm.text.documents import (
    BLOCK,
    JSON_LINES,
    Part,
    cut_documents,
    is_packed,
    json_lines,
    json_object,
    kind_of,
    lines_as_parts,
    opened,
    read_parts,
    text_as_parts,
    text_in,
)

TEXT_SUFFIXES = (".txt", ".md", ".rst", JSON_LINES)
NO_PROSE = {".csv": "a table", ".tsv": "a table", ".json": "JSON"}
PARQUET = ".parquet"
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

    An input is a UTF-8 file, one document; a file of JSON lines (named .jsonl or .ndjson), each an
    object whose text_key holds a document; either of them packed (.gz, .zst); a table (.parquet)
    of documents; a folder, for the files in and below it that end in one of TEXT_SUFFIXES, sorted,
    without hidden ones; "-" for standard input, one document, or lines of JSON; or
    "hf:NAME[:CONFIG[:SPLIT]]" for a dataset of the Hugging Face hub, or in a folder of its format.
    separator: what stands between documents in any of them.
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
        return standard_input(text_key, separator)
    if name.startswith(HUB):
        rows = hub_rows(*name.removeprefix(HUB).split(":", maxsplit=2))
        return corpus_of_rows(":".join(name.split(":")[:2]), rows, text_key, separator)
    if kind_of(Path(name)) == PARQUET and Path(name).is_file():
        rows = hub_rows("parquet", file=name)
        return corpus_of_rows(name, rows, text_key, separator)
    files, notes = find_text_files(Path(name))
    if dropped := unread_keys(files, text_key):
        notes.append(f"{name}: only {text_key!r} of each line is read, without {dropped}")
    packed = any(map(is_packed, files))
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
    for file in sorted(files_below(path)):
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


def files_below(folder: Path) -> Iterator[Path]:
    """The files in a folder and below, also behind links; and folders that cannot be read."""
    seen, refused = set(), []
    for place, folders, names in os.walk(
        folder, followlinks=True, onerror=lambda error: refused.append(Path(error.filename))
    ):
        real = os.path.realpath(place)
        if real in seen:  # a link may lead back to where it stands
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(place, name) for name in names)
    yield from refused


def why_skipped(file: Path, folder: Path) -> str | None:
    """Why a file of a folder is not read; None where it is."""
    if any(part.startswith(".") for part in file.relative_to(folder).parts):
        return "hidden"
    if file.is_dir() or not file.exists() or not os.access(file, os.R_OK):
        return "unreadable"
    return None if kind_of(file) in TEXT_SUFFIXES else "with another suffix"


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


def standard_input(text_key: str, separator: str | None) -> Corpus:
    """What comes from standard input, kept in a temporary file, for it is read twice.

    Lines of JSON are taken for such where the first one is an object.
    """
    if sys.stdin is None:
        raise ValueError("standard input is closed: let a file or a program be its source")
    copy, name = tempfile.TemporaryFile(), "standard input"  # noqa: SIM115 - the system removes it
    shutil.copyfileobj(sys.stdin.buffer, copy)
    size, notes = copy.tell(), ()
    copy.seek(0)
    with suppress(ValueError):
        lines = iter(partial(copy.readline, BLOCK), b"")
        json_object(next((line for line in lines if line.strip()), b""), name)
        notes = (f"{name}: read as lines of JSON",)

    def parts() -> Iterator[Part]:
        copy.seek(0)
        read = partial(lines_as_parts, text_key=text_key) if notes else text_as_parts
        yield from read(copy, name, separator=separator)

    return Corpus(name, parts, size, notes)


def corpus_of_rows(
    name: str, rows: Callable[[], Iterable[dict]], text_key: str, separator: str | None
) -> Corpus:
    """The texts of rows."""

    def parts() -> Iterator[Part]:
        try:
            for number, row in enumerate(rows(), start=1):
                text, where = text_in(row, text_key, f"row {number}"), f"{name}, row {number}"
                yield from cut_documents([text], separator, where=where, line=0)
        except Exception as error:  # of many kinds, from the hub, from files, from us
            raise ValueError(f"{name}: {str(error) or type(error).__name__}") from None

    return Corpus(name, parts)


def hub_rows(
    name: str, config: str = "", split: str = "train", *, file: str | None = None
) -> Callable[[], Iterable[dict]]:
    """What gives the rows of a dataset on the Hugging Face hub, or in a file or folder here.

    file: of the format that name says.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"{file or HUB + name} needs the package datasets: pip install datasets"
        ) from None
    if not file and "/" not in name and not (name and Path(name).is_dir()):
        raise ValueError(f"{HUB}{name}: name a dataset, {HUB}owner/name, or a folder that exists")
    options = {"split": split, "streaming": True, "data_files": file}
    return partial(load_dataset, name, config or None, **options)
