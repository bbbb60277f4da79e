"""Checkpoints: a step of a run on disk, written whole and verified on the way back.

step_XXXXXXXX.pt is the state after that many updates; best.pt is a second name for the one with
the lowest validation loss. A file is a zip archive of tensors and plain values: its checksums show
when a bit has flipped (torch.load alone does not look), and it is read with weights_only=True,
which runs no code that someone may have put there.
"""

import os
import pickle
import shutil
import zipfile
from pathlib import Path

import torch

from nanolm.files import sync, whole_file

FORMAT = 1
BROKEN = (EOFError, zipfile.BadZipFile, pickle.UnpicklingError)  # what reading damage can raise
BEST = "best.pt"


def step_files(folder: str | Path) -> list[Path]:
    """The folder's step files, oldest first."""
    return sorted(Path(folder).glob("step_*.pt"), key=lambda path: (len(path.name), path.name))


def save(folder: str | Path, content: dict, *, best: bool, keep: int) -> Path:
    """Write the file of content["step"], and best.pt if best; then delete all but keep of them.

    content: what load gives back: tensors, numbers, strings, and dicts and lists of them.
    """
    folder = Path(folder)
    path = folder / f"step_{content['step']:08d}.pt"
    with whole_file(path) as file:
        torch.save({"format": FORMAT, **content}, file)
    if best:
        give_second_name(path, folder / BEST)
    for old in step_files(folder)[:-keep]:
        old.unlink()
    return path


def remove_all(folder: Path) -> None:
    """Delete the folder's checkpoints."""
    for path in [*step_files(folder), folder / BEST]:
        path.unlink(missing_ok=True)


def give_second_name(path: Path, name: Path) -> None:
    """Let name show the same file as path, in place of what it showed before."""
    temporary = name.with_name(f".{name.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without links
        shutil.copyfile(path, temporary)
        sync(temporary)
    os.replace(temporary, name)
    sync(name.parent)


def load(path: str | Path) -> dict:
    """What save has written, on the CPU. Raises ValueError saying what is wrong with the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"its part {damaged} is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError("it is not a checkpoint of this version of nanolm")
    except (ValueError, OSError, RuntimeError, *BROKEN) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"cannot read the checkpoint {path}: {reason}") from None
    return content


def load_newest(folder: str | Path) -> tuple[dict, list[str]]:
    """The newest step file that is sound, and a line about each newer one that is not.

    Raises FileNotFoundError where the folder has no step file, ValueError where none of them is
    sound.
    """
    return _load_first(folder, step_files(folder)[::-1])


def load_best(folder: str | Path) -> tuple[dict, list[str]]:
    """best.pt, else the newest step file; otherwise as load_newest."""
    best = Path(folder) / BEST
    return _load_first(folder, [best] * best.exists() + step_files(folder)[::-1])


def _load_first(folder: str | Path, paths: list[Path]) -> tuple[dict, list[str]]:
    problems = []
    for path in paths:
        try:
            return load(path), problems
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError(f"{folder} has no sound checkpoint: {'; '.join(problems)}")
    raise FileNotFoundError(f"{folder} holds no checkpoint (no step_*.pt): train there first")
