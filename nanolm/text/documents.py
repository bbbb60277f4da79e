"""The documents in a file, in parts: for one may be larger than the memory.

They are cut where a word ends and white space follows: no token of GPT-2's pattern, or of the
usual others, reaches over such a place, and so the parts encode to what the whole would. (Only
where a block has no such place at all is it cut at its end.)
"""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from itertools import chain, repeat
from pathlib import Path
from typing import IO, NamedTuple

from nanolm.text.char_tokenizer import check_characters

JSON_LINES = ".jsonl"
OTHER_NAMES = {".ndjson": JSON_LINES}
BLOCK = 2**20  # bytes that are read at once, and characters of a part


class Part(NamedTuple):
    """Some text, whether its document ends with it, and where it stands."""

    text: str
    last: bool
    separated: bool = False  # whether a separator ends the document
    where: str = ""  # the file, or its line that holds the document
    line: int = 0  # of the file, where the part begins; 0: where says it


def documents(texts: Iterable[str]) -> Iterator[Part]:
    """Whole documents; empty ones are none."""
    return (Part(text, True) for text in texts if text)


def kind_of(path: Path) -> str:
    """The suffix that says what is in a file: of a packed one, the suffix before .gz or .zst."""
    name = path.name.lower()
    suffix = Path(name[: -len(path.suffix)] if is_packed(path) else name).suffix
    return OTHER_NAMES.get(suffix, suffix)


def is_packed(path: Path) -> bool:
    """Whether a file has to be unpacked to be read."""
    return path.suffix.lower() in PACKED


def open_zst(path: Path, mode: str) -> IO[bytes]:
    """The bytes of a file packed by Zstandard. Raises ValueError where no module can do it."""
    for module in ("compression.zstd", "zstandard"):
        with suppress(ImportError):
            return import_module(module).open(path, mode)
    raise ValueError(f"{path} needs a package: pip install zstandard; or unpack it")


PACKED = {".gz": gzip.open, ".zst": open_zst}  # after another suffix


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked. Raises ValueError where that fails in the block."""
    try:
        with PACKED.get(path.suffix.lower(), open)(path, "rb") as file:
            yield file
    except Exception as error:
        damaged = isinstance(error, (gzip.BadGzipFile, EOFError, zlib.error))
        if not damaged and type(error).__name__ != "ZstdError":  # of a module that may be missing
            raise
        raise ValueError(f"{path}: no sound packed file ({error}); pack it again") from None


def read_parts(
    path: Path, *, text_key: str = "text", separator: str | None = None
) -> Iterator[Part]:
    """The documents of a file."""
    with opened(path) as file:
        if kind_of(path) == JSON_LINES:
            yield from lines_as_parts(file, str(path), text_key=text_key, separator=separator)
        else:
            yield from text_as_parts(file, str(path), separator=separator)


def lines_as_parts(
    file: Iterable[bytes], name: str, *, text_key: str, separator: str | None
) -> Iterator[Part]:
    """The documents of lines of JSON."""
    for where, row in json_lines(file, name):
        text = text_in(row, text_key, where)
        yield from cut_documents([text], separator, where=where, line=0)


def text_as_parts(file: IO[bytes], name: str, *, separator: str | None) -> Iterator[Part]:
    """The documents of a text."""
    yield from cut_documents(decode_blocks(file, name), separator, where=name)


def read_text(path: Path) -> str:
    """A whole file as text, line ends as they are. Raises ValueError where it is not UTF-8."""
    with opened(path) as file:
        return "".join(decode_blocks(file, path))


def decode_blocks(file: IO[bytes], name: object) -> Iterator[str]:
    """The text of a file, block by block, without a byte order mark.

    Raises ValueError where it is not UTF-8, or has as many NULs as UTF-16.
    """
    decoder, end = codecs.getincrementaldecoder("utf-8-sig")(), 0
    while True:
        block = file.read(BLOCK)
        if not end and 3 * block.count(0) > len(block):
            raise ValueError(
                f"{name}: {block.count(0):,} of its first {len(block):,} bytes are NUL, as in "
                "UTF-16: convert the file to UTF-8, or leave it out"
            )
        end += len(block)
        try:
            yield decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name}: not UTF-8 at byte {end - len(error.object) + error.start} "
                f"(0x{error.object[error.start]:02x}); convert the file to UTF-8, or leave it out"
            ) from None
        if not block:
            return


def cut_documents(
    blocks: Iterable[str], separator: str | None = None, *, where: str = "", line: int = 1
) -> Iterator[Part]:
    """The documents of a text, in parts of about a block, each cut where a word ends.

    separator: what stands between documents; the end of its line belongs to it, and what is blank
    beside it is no document. where, line: those of the first part.
    """
    pattern = re.escape(separator) + r"(?:\r?\n)?+" if separator else r"(?!)"
    in_time = re.compile(pattern + r"(?=[\s\S]{2})")  # what may grow waits for the next block
    hold = len(separator) + 3 if separator else 0  # one that waits, and what comes behind it
    text, begun, found = "", False, None
    for block, ends in chain(zip(blocks, repeat(in_time)), [("", re.compile(pattern))]):
        text, start = text + block, 0
        for found in ends.finditer(text):
            document = text[start : found.start()]
            if begun or document.strip():
                yield Part(document, True, True, where, line)
            line += line and text.count("\n", start, found.end())
            start, begun = found.end(), False
        text = text[start:]
        if len(text) >= BLOCK + hold:
            cut = end_of_a_word(text[: len(text) - hold])
            yield Part(text[:cut], False, False, where, line)
            line += line and text.count("\n", 0, cut)
            text, begun = text[cut:], True
    if begun or (text.strip() if found else text):
        yield Part(text, True, False, where, line)


def end_of_a_word(text: str) -> int:
    """Where the last word ends that white space follows; the end of the text, where none does."""
    for i in range(len(text) - 1, 0, -1):
        if text[i].isspace() and text[i - 1].isalnum():
            return i
    return len(text)


def json_lines(file: Iterable[bytes], name: object) -> Iterator[tuple[str, dict]]:
    """The JSON object of each line, behind its place. Raises ValueError for a line of another."""
    for number, line in enumerate(file, start=1):
        if not line.isspace():
            where = f"{name}, line {number}"
            yield where, json_object(line, where)


def json_object(line: str | bytes, where: str) -> dict:
    """The object of a line. Raises ValueError where it is none."""
    try:
        line = (line if isinstance(line, str) else line.decode("utf-8-sig")).strip()
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = str(error).replace("line 1 column", "column")
        raise ValueError(f"{where}: no JSON ({reason})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: needs a JSON object, and is {line:.40}")
    return row


def text_in(row: dict, key: str, where: str) -> str:
    """What a row holds under a key. Raises ValueError where that is no text."""
    if key not in row:
        raise ValueError(
            f'{where}: there is no "{key}" among {", ".join(map(str, row)) or "no keys"}: choose '
            "one of them by --text_key, or a --task"
        )
    if not isinstance(row[key], str):
        raise ValueError(
            f'{where}: "{key}" is {row[key]!r:.40}, and no text: leave the line out, or choose '
            f"another of {', '.join(map(str, row))} by --text_key"
        )
    try:
        check_characters(row[key])  # JSON can spell half a surrogate pair
    except ValueError as error:
        raise ValueError(f'{where}: "{key}": {error}') from None
    return row[key]


def text_or_file(key: str, value: str) -> str:
    """The value of a key, or the content of the file that it names: FILE:PATH.

    Raises FileNotFoundError where there is none, ValueError where there is nothing in it.
    """
    text = value
    if value.startswith("FILE:"):
        path = Path(value.removeprefix("FILE:")).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"{key}={value!r}: there is no such file")
        text = read_text(path)
    if not text:
        raise ValueError(f"{key}={value!r}: there is no text; give at least one character")
    return text
