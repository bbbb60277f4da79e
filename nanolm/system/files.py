"""Files that appear whole or not at all, and their fingerprints.

A program can be killed between any two instructions, and a machine can lose its power. Whatever is
written in place is then half old and half new. So nothing here is written in place: the bytes go
to a temporary name in the same folder, are forced onto the disk (fsync), and take the real name in
one atomic rename. Whoever opens that name finds the old file or the new one, never a mixture.

Several files that belong together get a seal: one of them, moved last and removed first. The
folder is whole exactly when its seal is there.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows has no flock; everything but the lock works there
    fcntl = None


SCRATCH = ".partial"  # the folder in which others are filled


def sha256(path: str | Path) -> str:
    """The file's SHA-256, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: str | Path) -> None:
    """Force a file's content, or a folder's list of names, onto the disk."""
    if os.name == "nt" and os.path.isdir(path):
        return  # Windows cannot open a folder, and needs no sync of it
    descriptor = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: str | Path, *, needed: Callable[[], float] | None = None) -> Iterator[None]:
    """Let an error of the system name the file it is about: a full disk by itself does not.

    needed: about how many bytes the whole file takes.
    """
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)
        if error.errno == errno.ENOSPC and needed:
            error.strerror += f" (about {needed():,.0f} bytes are needed)"
        raise


def temporary_name(path: Path) -> Path:
    """The name under which a file is written before it takes its own."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def whole_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Write a file that appears at path when the block ends well, and not at all if it raises.

    Yields a binary file. A file that stood at path before stays as it was until then.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        with naming(path), open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path, *patterns: str) -> None:
    """Delete what kills amid whole_file have left of files with such names, as "*.pt"."""
    for pattern in patterns:
        for path in folder.glob(f".{pattern}.tmp"):
            path.unlink()


def append_text(path: str | Path, text: str) -> None:
    """Add to the end of a text file, as UTF-8. A kill can leave a part of the text."""
    with naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(text)


def json_of(path: str | Path) -> Any:
    """What a JSON file says, with a byte order mark before it or without.

    Raises ValueError or RecursionError where it is none.
    """
    return json.loads(Path(path).read_bytes())  # of which a text would keep the mark


def write_text(path: str | Path, text: str) -> None:
    """Write a small text file whole, as UTF-8."""
    with whole_file(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def made_folder(path: str | Path) -> Iterator[Path]:
    """Make a folder and its parents for the block; those it made and left empty go away again."""
    path = Path(path)
    made = [place for place in (path, *path.parents) if not place.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield path
    finally:
        with suppress(OSError):  # not empty, as it should be
            for place in made:
                place.rmdir()


@contextmanager
def whole_folder(folder: str | Path, *, seal: str) -> Iterator[Path]:
    """Fill a folder with files that appear together when the block ends well, the seal last.

    Yields an empty scratch folder to write them in. Other files of the folder stay, and so do the
    files of the same names if the block raises. A kill can leave a folder without its seal, and
    never one whose seal tells of other files than it holds. Raises ValueError where another
    process fills it.
    """
    scratch = Path(folder) / SCRATCH
    with made_folder(folder) as folder, lock(folder):
        shutil.rmtree(scratch, ignore_errors=True)  # what a killed process left
        scratch.mkdir()
        try:
            yield scratch
            for path in scratch.iterdir():
                sync(path)
                if (folder / path.name).is_dir():
                    raise ValueError(f"{folder / path.name} is a folder: remove it first")
            (folder / seal).unlink(
                missing_ok=True
            )  # from here on there is no old one to go back to
            sync(folder)
            for path in sorted(scratch.iterdir(), key=lambda path: path.name == seal):
                os.replace(path, folder / path.name)
            sync(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def lock(folder: str | Path) -> Iterator[None]:
    """Keep other processes from writing to an existing folder while the block runs.

    The system lets go of the lock when the process ends, however it ends. Raises ValueError where
    another process holds it.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder} is in use by another process: wait for it, or choose another folder"
            ) from None
        yield
    finally:
        os.close(descriptor)
