"""What comes with Python: its documentation, and the source of its library, as texts and labels.

It is on every machine that runs this, so that no lesson has to wait for a download.
"""

import ast
import hashlib
import inspect
import io
import platform
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from keyword import iskeyword
from pathlib import Path

from nanolm.text.conversations import ASSISTANT, PAIR, USER
from nanolm.text.corpus import Corpus
from nanolm.text.documents import documents
from nanolm.text.records import Record

CHAT = (USER, ASSISTANT)


def pydocs(folder: Path) -> Corpus:
    """English prose that comes with Python: its reference, and the library's docstrings.

    (It needs no folder, as the others here.)
    """
    texts = cache(pydocs_documents)  # it takes seconds, and little memory
    source = f"the documentation in Python {platform.python_version()}"
    return Corpus(source, lambda: documents(texts()))


def pydocs_documents() -> list[str]:
    """One document for each topic of the reference and each module.

    Text outside ASCII is left out, for a small alphabet.
    """
    return in_mixed_order({*reference_topics(), *standard_library_docstrings()})


def in_mixed_order(texts: set[str]) -> list[str]:
    """Texts in the order of their hashes.

    It is the same on every machine, and the end, which becomes the validation set, is about as
    easy as the rest.
    """
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
    """For each module of the standard library its docstrings, from top to bottom, each once."""
    seen = set()
    for _, _, tree in library_files():
        texts = [text for text in docstrings(tree) if text.isascii() and text not in seen]
        seen.update(texts)
        if texts:
            yield "\n\n".join(texts) + "\n\n\n"


def library_files() -> Iterator[tuple[Path, bytes, ast.Module]]:
    """Each file of the standard library: where it is in it, its bytes, and its syntax tree.

    The files are parsed, not imported.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests"}
    skipped |= {"idlelib", "lib2to3", "pydoc_data"}
    for path in sorted(library.rglob("*.py")):
        if not skipped.intersection(path.relative_to(library).parts):
            source = path.read_bytes()
            with suppress(SyntaxError):  # a template, or a file made to be wrong
                yield path.relative_to(library), source, ast.parse(source)


def docstrings(node: ast.AST) -> Iterator[str]:
    """The docstrings of a module and of all that it defines, from top to bottom, unindented."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "").strip()
        if text:
            yield text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case)):
            yield from docstrings(child)


# ------------------------------------------------------------------------------------------
# Labels for texts: which package does a docstring document?

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "mailbox", "multiprocessing")
PACKAGES += ("unittest", "urllib", "xml")


def pymodules(folder: Path) -> list[Record]:
    """The docstrings of some packages, without the words that name one, and their package."""
    names, found = re.compile(rf"\w*({'|'.join(PACKAGES)})\w*", re.IGNORECASE), {}
    for path, _, tree in library_files():
        package = path.with_suffix("").parts[0]
        for text in docstrings(tree) if package in PACKAGES else ():
            text = names.sub("", text).strip()
            if text and text.isascii():
                found.setdefault(text, Record((text,), (package,), str(path), str(path)))
    return list(found.values())


# ------------------------------------------------------------------------------------------
# Texts for texts: what does a function do?

LONGEST_SOURCE, LONGEST_SUMMARY, LONGEST_HELP = 800, 120, 300  # characters


def pysummaries(folder: Path) -> list[Record]:
    """The functions of the library without their docstrings, and the first paragraph of these."""
    found = {}
    for path, source, tree in library_files():
        lines = source.decode(errors="replace").splitlines()
        for _, node in definitions(tree):
            summary, [first, *rest] = first_paragraph(node), node.body
            if isinstance(node, ast.ClassDef) or not rest or len(summary) > LONGEST_SUMMARY:
                continue
            head, body = lines[node.lineno - 1 : first.lineno - 1], lines[first.end_lineno :]
            body = body[: node.end_lineno - first.end_lineno]
            text = inspect.cleandoc("\n" + "\n".join([*head, *body]))
            if summary and len(text) <= LONGEST_SOURCE and (text + summary).isascii():
                found.setdefault(text, Record((text, summary), PAIR, str(path), str(path)))
    return list(found.values())


def pyhelp(folder: Path) -> list[Record]:
    """Questions what the functions and classes of the library are for, and their docstrings."""
    found = {}
    for path, _, tree in library_files():
        module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        for name, node in definitions(tree):
            answer, full = first_paragraph(node), f"{module}.{name}"
            public = not any(part.startswith("_") for part in full.split("."))
            if answer and public and answer.isascii() and len(answer) <= LONGEST_HELP:
                parts = f"What does {full} do?", answer
                found.setdefault(full, Record(parts, CHAT, str(path), str(path)))
    return list(found.values())


def definitions(node: ast.AST, within: str = "") -> Iterator[tuple[str, ast.AST]]:
    """All functions and classes that a module or a class defines, by their qualified names."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield within + child.name, child
            yield from definitions(child, f"{within}{child.name}.")


def first_paragraph(node: ast.AST) -> str:
    """The first paragraph of a docstring, on one line."""
    text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "").strip()
    return " ".join(text.split("\n\n")[0].split())


# ------------------------------------------------------------------------------------------
# Labels for words: which role does a name play in a program?

LINE_WORDS = 64  # lines are joined up to so many words


def pyroles(folder: Path) -> list[Record]:
    """The library's source in pieces of some lines: its words, and the role of each name."""
    found = []
    for path, source, tree in library_files():
        words, roles = [], []
        for word, role in words_and_roles(source.decode(errors="replace"), tree):
            if word:
                words.append(word)
                roles.append(role)
            elif len(words) >= LINE_WORDS:
                found.append(Record(tuple(words), tuple(roles), str(path), str(path)))
                words, roles = [], []
        if words:
            found.append(Record(tuple(words), tuple(roles), str(path), str(path)))
    return [record for record in found if any(record.labels)]


def words_and_roles(source: str, tree: ast.Module) -> Iterator[tuple[str, str | None]]:
    """The tokens of a program with the roles of its names; ("", None) after each logical line.

    Of a string only its quotes are left.
    """
    roles, imports, before = roles_of(tree), lines_of_imports(tree), ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        word = token.string.strip()
        if token.type == tokenize.NEWLINE:
            yield "", None
        if token.type == tokenize.COMMENT or not word:
            continue
        role = None
        if token.type == tokenize.NAME and not iskeyword(word):
            defined = {"def": "function", "class": "class"}.get(before)
            line, column = token.start  # in characters; those of the tree are in bytes
            place = line, len(token.line[:column].encode())
            role = defined or ("import" if line in imports else roles.get(place))
        yield ('""' if token.type == tokenize.STRING else word), role
        before = word


def roles_of(tree: ast.Module) -> dict[tuple[int, int], str]:
    """The roles of names by their place, line and column, but for those of definitions."""
    nodes = list(ast.walk(tree))
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    roles = {}
    for node in nodes:
        if isinstance(node, ast.Attribute):
            place = node.end_lineno, node.end_col_offset - len(node.attr.encode())
            roles[place] = "method" if id(node) in called else "attribute"
        elif isinstance(node, ast.Name):
            roles[node.lineno, node.col_offset] = "call" if id(node) in called else "variable"
        elif isinstance(node, ast.arg):
            roles[node.lineno, node.col_offset] = "parameter"
        elif isinstance(node, ast.keyword) and node.arg:
            roles[node.lineno, node.col_offset] = "keyword"
    return roles


def lines_of_imports(tree: ast.Module) -> set[int]:
    """The numbers of the lines that import something."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    return {line for node in nodes for line in range(node.lineno, node.end_lineno + 1)}
