"""Where text comes from: a corpus is a sequence of documents that can be read more than once.

The text may be the user's own files and folders, or a dataset that nanolm knows by name: Python's
own documentation, which is on every machine that runs this, or tiny Shakespeare, which is
downloaded once.
"""

import ast
import hashlib
import http.client
import inspect
import platform
import sysconfig
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from nanolm.files import made_folder, sha256, whole_file

TEXT_SUFFIXES = (".txt", ".md", ".rst")


@dataclass(frozen=True)
class Corpus:
    """Documents from somewhere. Each call of documents() reads them anew, in the same order."""

    source: str  # where they come from, in words
    documents: Callable[[], Iterable[str]]


def text_files(paths: Iterable[str | Path]) -> Corpus:
    """A corpus of UTF-8 files, one document each, in the order given.

    A folder stands for the files in and below it whose names end in one of TEXT_SUFFIXES, sorted;
    hidden ones are left out. Raises FileNotFoundError for a path that is not there, ValueError for
    a folder without text and, on reading, for a file that is not UTF-8.
    """
    files = [file for path in paths for file in find_text_files(Path(path))]

    def documents() -> Iterator[str]:
        # The bar counts bytes and shows itself only on a terminal and on work that takes a while.
        total = sum(file.stat().st_size for file in files)
        with tqdm(total=total, unit="B", unit_scale=True, delay=1, disable=None) as bar:
            for file in files:
                yield read_text(file)
                bar.update(file.stat().st_size)

    return Corpus(", ".join(str(path) for path in paths), documents)


def find_text_files(path: Path) -> list[Path]:
    """The file itself, or the text files of a folder, by the rules of text_files."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: no such file or folder; --input takes text files and folders"
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


def read_text(path: Path) -> str:
    """A whole file as text, line ends as they are. Raises ValueError where it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 at byte {error.start} (0x{error.object[error.start]:02x}); "
            "convert the file to UTF-8, or leave it out"
        ) from None


# ------------------------------------------------------------------------------------------
# The known datasets


def pydocs(folder: Path) -> Corpus:
    """English prose that comes with Python: its reference, and the library's docstrings."""
    documents = pydocs_documents()  # it takes seconds, and little memory
    return Corpus(f"the documentation in Python {platform.python_version()}", lambda: documents)


def pydocs_documents() -> list[str]:
    """One document for each topic of the reference and each module, in an order that mixes them.

    The order is that of their hashes: the same on every machine, and the end, which becomes the
    validation set, is about as easy as the rest. Text outside ASCII is left out, for a small
    alphabet.
    """
    documents = {*reference_topics(), *standard_library_docstrings()}
    return sorted(documents, key=lambda text: hashlib.sha256(text.encode()).digest())


def reference_topics() -> Iterator[str]:
    """The topics that help() knows."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        topics = {}
    for name in sorted(topics):
        if topics[name].isascii():
            yield topics[name].strip() + "\n\n\n"


def standard_library_docstrings() -> Iterator[str]:
    """For each module of the standard library its docstrings, from top to bottom, each once.

    The files are parsed, not imported.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    skipped = {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "pydoc_data",
    }
    seen = set()
    for path in sorted(library.rglob("*.py")):
        if skipped.intersection(path.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:
            continue  # a template, or a file made to be wrong
        texts = [text for text in docstrings(tree) if text.isascii() and text not in seen]
        seen.update(texts)
        if texts:
            yield "\n\n".join(texts) + "\n\n\n"


def docstrings(node: ast.AST) -> Iterator[str]:
    """The docstrings of a module and of all that it defines, from top to bottom, unindented."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "").strip()
        if text:
            yield text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case)):
            yield from docstrings(child)


SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_BYTES = 1_115_394
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def tiny_shakespeare(folder: Path, *, url: str = SHAKESPEARE_URL, timeout: float = 30.0) -> Corpus:
    """About 40,000 lines of Shakespeare's plays, the text of Karpathy's char-rnn (2015).

    Read from input.txt in the folder; downloaded to it where that is missing.
    """
    path = folder / "input.txt"
    if not path.exists():
        download(
            url, path, size=SHAKESPEARE_BYTES, sha256_wanted=SHAKESPEARE_SHA256, timeout=timeout
        )
    elif sha256(path) != SHAKESPEARE_SHA256:
        raise ValueError(
            f"{path} is not tiny Shakespeare (its sha256 differs): delete it, to download the "
            f"text, or use it under another name: python prepare.py NAME --input {path}"
        )
    return Corpus(f"tiny Shakespeare ({SHAKESPEARE_URL})", lambda: [read_text(path)])


def download(url: str, path: Path, *, size: int, sha256_wanted: str, timeout: float) -> None:
    """Fetch a file of known size and hash; it appears at path whole and right, or not at all.

    timeout: seconds without a byte before giving up. Raises ValueError saying what went wrong.
    """
    digest, received = hashlib.sha256(), 0
    try:
        with (
            urllib.request.urlopen(url, timeout=timeout) as response,
            tqdm(total=size, unit="B", unit_scale=True, delay=1, disable=None) as bar,
            made_folder(path.parent),
            whole_file(path) as file,
        ):
            while received <= size and (chunk := response.read(2**16)):  # never far past the end
                file.write(chunk)
                digest.update(chunk)
                received += len(chunk)
                bar.update(len(chunk))
            if received != size:
                got = "more" if received > size else str(received)
                raise ValueError(f"got {got} of {size} bytes")
            if digest.hexdigest() != sha256_wanted:
                raise ValueError(f"its sha256 is {digest.hexdigest()}, expected {sha256_wanted}")
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it is the server's answer, too
        raise ValueError(
            f"could not download {url} ({error}); try again, or put the file at {path} yourself"
        ) from None


@dataclass(frozen=True)
class KnownDataset:
    """A corpus that nanolm can find by itself, and the tokenizer that goes with it."""

    corpus: Callable[[Path], Corpus]  # given the dataset's folder
    tokenizer: str


KNOWN_DATASETS = {
    "pydocs": KnownDataset(pydocs, "char"),
    "shakespeare_char": KnownDataset(tiny_shakespeare, "char"),
}
