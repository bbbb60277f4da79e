"""Files that appear whole or not at all, and their fingerprints.

A program can be killed between any two instructions, and a machine can lose its power. Whatever is
written in place is then half old and half new. So nothing here is written in place: the bytes go
to a temporary name in the same folder, are forced onto the disk (fsync), and take the real name in
one atomic rename. Whoever opens that name finds the old file or the new one, never a mixture.

Several files that belong together get a seal: one of them, moved last and removed first. The
folder is whole exactly when its seal is there.
"""

import hashlib
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows has no flock; everything but the lock works there
    fcntl = None


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
def whole_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Write a file that appears at path when the block ends well, and not at all if it raises.

    Yields a binary file. A file that stood at path before stays as it was until then.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # the next try replaces what a kill left
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a small text file whole, as UTF-8."""
    with whole_file(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def made_folder(path: str | Path) -> Iterator[Path]:
    """Make a folder and its parents for the block; those it made and left empty go away again."""
    path = Path(path)
    made = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
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
    scratch = Path(folder) / ".partial"
    with made_folder(folder) as folder, lock(folder):
        shutil.rmtree(scratch, ignore_errors=True)  # what a killed process left
        scratch.mkdir()
        try:
            yield scratch
            for path in scratch.iterdir():
                sync(path)
                if (folder / path.name).is_dir():
                    raise ValueError(f"{folder / path.name} is a folder: remove it first")
            with interrupts_held_back():  # from here on there is no old one to go back to
                (folder / seal).unlink(missing_ok=True)
                sync(folder)
                for path in sorted(scratch.iterdir(), key=lambda path: path.name == seal):
                    os.replace(path, folder / path.name)
                sync(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Let Ctrl-C wait until the block ends; a process that starts in it never hears of any.

    (The terminal sends Ctrl-C to all processes, and only the first one has an answer.)
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = []
    before = signal.signal(signal.SIGINT, lambda *signal_and_frame: came.append(signal_and_frame))
    masks = hasattr(signal, "pthread_sigmask")  # not on Windows; processes inherit the mask
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if masks else None
    try:
        yield
    finally:
        if masks:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, before)
        if came and callable(before):
            before(*came[0])


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
