"""What a run leaves, in a form in which == compares it to the last bit."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch

from nanolm.runs.checkpoint import BEST, load, step_files, step_of
from nanolm.runs.log import read_metrics

WAYS = ("out_dir", "init_from", "overwrite")  # keys that say only how a run was started


def frozen(content: Any) -> Any:
    """A checkpoint's content, or a part of it, with a hash in the place of each tensor."""
    if isinstance(content, torch.Tensor):
        return content.dtype, content.shape, hashlib.sha256(content.numpy().tobytes()).hexdigest()
    if isinstance(content, dict):
        return {key: frozen(value) for key, value in content.items() if key not in WAYS}
    return [frozen(value) for value in content] if isinstance(content, (list, tuple)) else content


def numbers(folder: str | Path) -> list[dict]:
    """The rows of a run's metrics, but for its time."""
    rows = read_metrics(Path(folder, "metrics.jsonl"))
    return [{k: row[k] for k in row if k not in ("tokens_per_second", "seconds")} for row in rows]


def cut(folder: str | Path, *, after: int) -> Path:
    """A copy of a run that has come no further than a step; its metrics still tell of the rest."""
    copy = Path(shutil.copytree(folder, f"{folder}_cut{after}"))
    for path in step_files(copy):
        if step_of(path) > after:
            path.unlink()
    (copy / BEST).unlink()
    return copy


def outcome(folder: str | Path) -> dict:
    """All that a run leaves, but for its speed: the newest step, the best one, the numbers."""
    newest, best = step_files(folder)[-1], Path(folder, BEST)
    return {"step": frozen(load(newest)), "best": frozen(load(best)), "rows": numbers(folder)}
