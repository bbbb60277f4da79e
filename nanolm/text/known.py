"""The datasets that nanolm knows by name: where their text comes from, and their tokenizer.

Python's own documentation is on every machine that runs this. Tiny Shakespeare is downloaded once.
"""

import ast
import hashlib
import http.client
import inspect
import platform
import sysconfig
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from nanolm.system.files import sha256, whole_file
from nanolm.text.corpus import Corpus
from nanolm.text.documents import documents, read_parts


def pydocs(folder: Path) -> Corpus:
    """English prose that comes with Python: its reference, and the library's docstrings.

    (It needs no folder.)
    """
    texts = cache(pydocs_documents)  # it takes seconds, and little memory
    source = f"the documentation in Python {platform.python_version()}"
    return Corpus(source, lambda: documents(texts()))


def pydocs_documents() -> list[str]:
    """One document for each topic of the reference and each module, in an order that mixes them.

    The order is that of their hashes: the same on every machine, and the end, which becomes the
    validation set, is about as easy as the rest. Text outside ASCII is left out, for a small
    alphabet.
    """
    texts = {*reference_topics(), *standard_library_docstrings()}
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())


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
    skipped = {"site-packages", "dist-packages", "test", "tests"}
    skipped |= {"idlelib", "lib2to3", "pydoc_data"}
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
    source = f"tiny Shakespeare ({SHAKESPEARE_URL})"
    return Corpus(source, lambda: read_parts(path), SHAKESPEARE_BYTES)


def download(url: str, path: Path, *, size: int, sha256_wanted: str, timeout: float) -> None:
    """Fetch a small file of known size and hash; it appears at path whole, or not at all.

    timeout: seconds without a byte before giving up. Raises ValueError saying what went wrong.
    """
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            data = response.read(size + 1)  # never far past the end
        if hashlib.sha256(data).hexdigest() != sha256_wanted:
            raise ValueError(f"its sha256 differs; got {len(data)} bytes, expected {size}")
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it is the server's answer, too
        raise ValueError(
            f"could not download {url} ({error}); try again, or put the file at {path} yourself"
        ) from None
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(data)


@dataclass(frozen=True)
class KnownDataset:
    """A corpus that nanolm can find by itself, and the tokenizer that goes with it."""

    corpus: Callable[[Path], Corpus]  # given the dataset's folder
    tokenizer: str  # as for prepare.py


KNOWN_DATASETS = {
    "pydocs": KnownDataset(pydocs, "bpe:2048"),
    "shakespeare": KnownDataset(tiny_shakespeare, "gpt2"),
    "shakespeare_char": KnownDataset(tiny_shakespeare, "char"),
}
