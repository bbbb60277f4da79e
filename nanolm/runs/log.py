"""The log of a run: lines on the console for people, metrics.jsonl for programs."""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from nanolm.runs.settings import TrainConfig
from nanolm.system.files import append_text, write_text

# Dense bf16/fp16 peak of a GPU, FLOP/s, from its data sheet; the first name that its own contains.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "A10": 125e12,
    "V100": 125e12,
    "T4": 65e12,
}

NO_SCORES = ("step", "train_loss", "val_loss", "seconds", "sample")  # of an evaluation


def peak_flops(gpu_name: str) -> float | None:
    """The GPU's half-precision peak in FLOP/s; None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in gpu_name), None)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42s, 3m05s, 2h10m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; what is no row, as a line cut off by a kill, is left out."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    rows = []
    for line in text.splitlines():
        with suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    rows = [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]
    return [row for row in rows if all(map(fits, row, row.values()))]


def fits(key: str, value: object) -> bool:
    """Whether a row may hold such a value."""
    return isinstance(value, str if key == "sample" else (int, float, type(None)))


def scores_of(row: dict) -> dict[str, float]:
    """What the task has scored in an evaluation, beside the losses."""
    return {key: row[key] for key in row if key not in NO_SCORES}


@dataclass
class Log:
    """Writes a run's rows to metrics.jsonl, and says them on the console.

    Rows of updates hold step, loss, lr, grad_norm, tokens_per_second and (given a peak) mfu; rows
    of evaluations hold step, train_loss, val_loss, what else the task scores, and a sample where
    there is one. Both hold seconds: the time of all updates so far, without that of evaluations,
    of checkpoints, and of updates that were lost. Update number s, from 0, has step s, and an
    evaluation the number of updates before it: each step comes once per kind.
    """

    path: Path
    config: TrainConfig
    start: int = 0  # the step to continue from: what the file says of later ones is forgotten
    evaluated: int = -1  # the last step evaluated before; the same holds
    flops_per_token: float = 0.0
    peak: float | None = None  # FLOP/s of the GPUs, for their utilization (MFU)
    also: list[Callable[[dict], None]] = field(default_factory=list)  # called with each row

    def __post_init__(self):
        start = {"loss": self.start, "val_loss": self.evaluated + 1}
        rows = read_metrics(self.path)
        kept = [
            row for row in rows if all(row["step"] < start[key] for key in start if key in row)
        ]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.before = max((row.get("seconds") or 0.0 for row in kept), default=0.0)
        self.updates, self.tokens, self.seconds = 0, 0, 0.0
        self.evaluation_seconds = self.evaluations_took = 0.0  # the last one, and all

    def update(
        self, step: int, *, loss: float, lr: float, grad_norm: float, seconds: float, tokens: int
    ) -> None:
        """Note an update of so many tokens.

        Every log_interval of them, write it and print it with the speed.
        """
        self.updates += 1
        self.tokens += tokens
        self.seconds += seconds
        if step % self.config.log_interval and step + 1 != self.config.max_iters:
            return
        speed = self.tokens / self.seconds
        row = {"step": step, "loss": loss, "lr": lr, "grad_norm": grad_norm}
        row["tokens_per_second"] = speed
        row["seconds"] = self.before + self.seconds
        line = f"step {step:6d} | loss {loss:7.4f} | lr {lr:.2e} | gradient norm {grad_norm:6.3f}"
        line += f" | {speed:9,.0f} tok/s"
        if self.peak:
            row["mfu"] = speed * self.flops_per_token / self.peak
            line += f" | mfu {row['mfu']:.1%}"
        if step > self.start:  # the first update says nothing of the speed: it may have compiled
            line += f" | {duration(self.seconds_left(step))} left"
        print(line, flush=True)
        self._write(row)
        self.before += self.seconds
        self.updates, self.tokens, self.seconds = 0, 0, 0.0

    def seconds_left(self, step: int) -> float:
        """How long the run still takes, judging by the updates since the last line."""
        end, interval = self.config.max_iters, self.config.eval_interval
        evaluations = -(-end // interval) - (step + 1) // interval  # one more at the end
        updates = end - step - 1
        return updates * self.seconds / self.updates + evaluations * self.evaluation_seconds

    def evaluation(
        self,
        step: int,
        scores: dict[str, float],
        *,
        seconds: float,
        sample: tuple[str, str] | None = None,
    ) -> None:
        """Note an evaluation, how long it took, and what the model does then (title, text)."""
        self.evaluation_seconds = seconds
        self.evaluations_took += seconds
        lines, row = [evaluation_line(step, scores)], {"step": step, **scores}
        row["seconds"] = self.before + self.seconds
        if sample:
            title, row["sample"] = sample
            lines += [f"    {title}:", *(f"    | {line}" for line in sample[1].split("\n"))]
        print("\n".join(lines), flush=True)
        self._write(row)

    def _write(self, row: dict) -> None:
        plain = {  # JSON has no NaN
            key: n if isinstance(n, str) or math.isfinite(n) else None for key, n in row.items()
        }
        append_text(self.path, json.dumps(plain) + "\n")
        for call in self.also:
            call(row)


def best_evaluation(rows: Sequence[dict], config: TrainConfig) -> dict | None:
    """Of a run's rows the evaluation that best_by finds best, but for that of step 0."""
    keys = {"val_loss", "val_loss" if config.best_by == "loss" else config.best_by}
    found = [row for row in rows if None not in map(row.get, keys) and row["step"] > 0]
    return min(found, key=config.score_of, default=None)


def evaluation_line(step: int, scores: dict[str, float]) -> str:
    """An evaluation as a line for the console."""
    return " | ".join((f"step {step:6d}", *score_words(scores)))


def score_words(scores: dict[str, float]) -> list[str]:
    """Scores for the console, but for those of single labels, as "f1/email"."""
    shown = {name.replace("_", " "): value for name, value in scores.items() if "/" not in name}
    return [f"{name} {value:.4f}" for name, value in shown.items()]


def wandb_log(project: str, name: str, config: dict) -> Callable[[dict], None]:
    """A function that sends a row of metrics to Weights & Biases."""
    try:
        import wandb
    except ImportError:
        raise ValueError("wandb_log=True needs the package wandb: pip install wandb") from None
    run = wandb.init(project=project, name=name, config=config)
    return lambda row: run.log(row, step=row["step"])
