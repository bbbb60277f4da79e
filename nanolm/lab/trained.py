"""A run as its folder tells of it, and what of several runs compares."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanolm.model import count_parameters
from nanolm.plan.costs import shapes_of
from nanolm.runs.folder import METRICS_FILE, RUN_FILE, RUNS
from nanolm.runs.log import best_evaluation, duration, read_metrics
from nanolm.runs.settings import TrainConfig
from nanolm.system.config import load_config
from nanolm.system.files import lock
from nanolm.text.tokenizer import TOKENIZER_FILE

HEADS = ("run", "task", "parameters", "updates", "best loss", "bits/byte", "time", "state")


@dataclass(frozen=True)
class Trained:
    """A run as its folder tells of it."""

    name: str
    folder: Path
    config: TrainConfig
    rows: list[dict]

    def best(self) -> dict:
        """The best evaluation, if there is one."""
        return best_evaluation(self.rows, self.config) or {}

    def updates(self) -> int:
        """How many updates were made, as far as they were logged."""
        return max((row["step"] + ("loss" in row) for row in self.rows), default=0)

    def along(self, axis: str, steps: np.ndarray) -> np.ndarray:
        """The updates, tokens or time of training before each of these steps (N,).

        Tokens: with those that fill up rows. Time: the seconds of updates alone, NaN where they
        are not logged.
        """
        if axis == "tokens":
            return steps * self.config.tokens_per_update
        if axis == "time":
            known = {row["step"] + ("loss" in row): row.get("seconds") for row in self.rows}
            known = {0: 0.0} | {n: time for n, time in known.items() if time is not None}
            return np.interp(steps, *np.array(sorted(known.items())).T, right=np.nan)
        return steps

    def state(self) -> str:
        """finished, running or stopped."""
        if any("val_loss" in row and row["step"] >= self.config.max_iters for row in self.rows):
            return "finished"
        try:
            with lock(self.folder):  # for an instant: a run holds it from its start to its end
                return "stopped"
        except ValueError:
            return "running"

    def vocabulary(self) -> object:
        """What a loss chooses from: the labels, or the tokens."""
        path = self.folder / TOKENIZER_FILE
        return self.config.labels or (path.read_bytes() if path.is_file() else None)

    def cells(self) -> list[str]:
        """Its row of a table, under HEADS."""
        best, [seconds] = self.best(), self.along("time", np.array([self.updates()]))
        losses = (best.get(key) for key in ("val_loss", "bits_per_byte"))
        size = f"{count_parameters(shapes_of(self.config.model_config())):,}"
        done = f"{self.updates():,} of {self.config.max_iters:,}"
        scores = ("-" if loss is None else f"{loss:.4f}" for loss in losses)
        time = duration(seconds) if seconds > 0 else "-"
        return [self.name, self.config.task, size, done, *scores, time, self.state()]


def open_run(folder: Path) -> Trained:
    """Read what a run's folder holds. Raises FileNotFoundError or ValueError where it is none."""
    for name in (RUN_FILE, METRICS_FILE):
        if not (folder / name).is_file():
            found = [str(path.parent) for path in sorted(RUNS.glob(f"*/{METRICS_FILE}"))]
            lacks = f"has no {name}" if folder.is_dir() else "is no folder"
            choose = f"choose from {', '.join(found)}" if found else "train one with train.py"
            raise FileNotFoundError(f"{folder} {lacks}, so it is not a run: {choose}")
    try:
        config = load_config(TrainConfig, [str(folder / RUN_FILE)])
        config.model_config()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / RUN_FILE} is damaged ({error}): leave this run out") from None
    return Trained(folder.resolve().name, folder, config, read_metrics(folder / METRICS_FILE))


def common_loss(runs: Sequence[Trained]) -> tuple[str, list[str]]:
    """The key of the loss by which the runs compare best, and what to know of it, in sentences."""
    tasks, texts = ({getattr(run.config, key) for run in runs} for key in ("task", "dataset"))
    key, notes = "val_loss", []
    if len(tasks) > 1:
        notes += [f"Different tasks ({', '.join(sorted(tasks))}): their losses do not compare."]
    elif len({run.vocabulary() for run in runs}) > 1:
        notes += ["Different vocabularies: losses of a token do not compare."]
        if all("bits_per_byte" in run.best() for run in runs):
            key, notes = "bits_per_byte", [f"{notes[0]} Bits per byte of text do, and are drawn."]
    if len(texts) > 1:
        notes += [f"Different validation texts ({', '.join(sorted(texts))}): some are harder."]
    return key, notes
