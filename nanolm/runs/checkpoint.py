"""Checkpoints: a step of a run on disk, written whole and verified on the way back.

step_XXXXXXXX.pt is the state after that many updates; best.pt is a second name for the one with
the lowest validation loss. A file is a zip archive of tensors and plain values: its checksums show
when a bit has flipped (torch.load alone does not look), and it is read with weights_only=True,
which runs no code that someone may have put there.

At every moment there is a file to go back to. A new one is complete on the disk before it gets its
name, best.pt gets its name before the step does (a run that is killed in between makes that step
again, and the same file), and old steps go last.
"""

import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from nanolm.system.files import sync, temporary_name, whole_file

FORMAT = 2
BEST = "best.pt"
Check = Callable[[dict], None]  # raises ValueError, saying what is wrong with a content


def accept(content: dict) -> None:
    """The check that finds nothing wrong."""


def step_of(path: Path) -> int:
    """The step that a step file is of, by its name."""
    return int(path.stem.removeprefix("step_"))


def step_files(folder: str | Path) -> list[Path]:
    """The folder's step files, oldest first."""
    paths = Path(folder).glob("step_*.pt")
    return sorted((path for path in paths if re.fullmatch(r"step_\d+", path.stem)), key=step_of)


def best_file(folder: str | Path) -> list[Path]:
    """best.pt, if there is one."""
    path = Path(folder) / BEST
    return [path] if path.exists() else []


# ------------------------------------------------------------------------------------------
# Writing


def save(folder: str | Path, content: dict, *, best: bool, keep: int) -> Path:
    """Write the file of content["step"], and best.pt if best; then delete all but keep of them.

    content: what load gives back: tensors, numbers, strings, and dicts and lists of them. Raises
    ValueError where the file cannot be written; those before it stay.
    """
    folder = Path(folder)
    path = folder / f"step_{content['step']:08d}.pt"
    first = folder / BEST if best else path
    try:
        with whole_file(first) as file:
            torch.save({"format": FORMAT, **content}, file)
        if best:
            give_second_name(first, path)
    except (OSError, RuntimeError) as error:
        # torch.save raises an error of its own in place of the system's
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        needed = sum(tensor.nbytes for tensor in tensors(content))
        raise ValueError(
            f"cannot write {path}: {reason.strerror}; it needs {needed:,} bytes"
        ) from None
    for old in [path for path in step_files(folder) if path.is_file()][:-keep]:
        old.unlink()
    return path


def tensors(content: Any) -> Iterator[torch.Tensor]:
    """All tensors in a content."""
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, (dict, list, tuple)):
        for part in content.values() if isinstance(content, dict) else content:
            yield from tensors(part)


def is_finite(content: dict) -> bool:
    """Whether every number in the content's tensors is finite."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors(content))


def give_second_name(path: Path, name: Path) -> None:
    """Let name show the same file as path, in place of what it showed before."""
    temporary = temporary_name(name)
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(path, temporary)
        except OSError:  # a file system without links
            shutil.copyfile(path, temporary)
            sync(temporary)
        os.replace(temporary, name)
    finally:
        temporary.unlink(missing_ok=True)
    sync(name.parent)


def remove_all(folder: Path) -> None:
    """Delete the folder's checkpoints."""
    for path in [folder / BEST, *reversed(step_files(folder))]:
        path.unlink(missing_ok=True)


def set_aside(folder: Path, *, after: int) -> None:
    """Rename the step files of later steps, which proved bad, so that their names are free."""
    for path in step_files(folder):
        if step_of(path) > after:
            os.replace(path, f"{path}.bad")


# ------------------------------------------------------------------------------------------
# Reading


def load(path: str | Path, check: Check = accept) -> dict:
    """What save has written, on the CPU. Raises ValueError saying what is wrong with the file."""
    try:
        if not Path(path).is_file():
            raise ValueError("it is not a file")
        with zipfile.ZipFile(path) as archive:
            folders = (part.filename for part in archive.infolist() if part.external_attr)
            damaged = archive.testzip() or next(folders, None)  # torch reads nothing of a folder
        if damaged:
            raise ValueError(f"its part {damaged} is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or not isinstance(content.get("format"), int):
            raise ValueError("it is not a checkpoint of nanolm")
        if content["format"] != FORMAT:
            age = "a newer" if content["format"] > FORMAT else "an older"
            raise ValueError(f"it was written by {age} version of nanolm")
        check(content)
    except MemoryError:
        raise
    except Exception as error:  # reading damage can raise anything
        reason = " ".join(str(error).split())[:200]
        if not isinstance(error, ValueError):
            reason = f"it is not built like a checkpoint ({type(error).__name__}: {reason})"
        raise ValueError(f"cannot read the checkpoint {path}: {reason}") from None
    return content


def load_newest(folder: str | Path, check: Check = accept) -> tuple[dict, list[str]]:
    """The newest step file that is sound, else best.pt, and a line about each that is not.

    check raises ValueError for a content that is not as it should be. Raises FileNotFoundError
    where the folder has no file, ValueError where none of them is sound.
    """
    return _load_first(folder, [*reversed(step_files(folder)), *best_file(folder)], check)


def load_best(folder: str | Path, check: Check = accept) -> tuple[dict, list[str]]:
    """best.pt, else the newest step file; otherwise as load_newest."""
    return _load_first(folder, [*best_file(folder), *reversed(step_files(folder))], check)


def _load_first(folder: str | Path, paths: list[Path], check: Check) -> tuple[dict, list[str]]:
    problems = []
    for path in paths:
        try:
            return load(path, check), problems
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError(
            f"{folder} has no sound checkpoint: {'; '.join(problems)}; nothing was "
            "changed: train in another --out_dir"
        )
    raise FileNotFoundError(f"{folder} holds no checkpoint (no step_*.pt): train there first")
