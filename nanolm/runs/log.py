"""The log of a run: lines on the console, metrics.jsonl for programs, a picture for people."""

import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nanolm.system.files import append_text, whole_file, write_text

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
    kinds = (int, float, type(None))
    return [row for row in rows if all(isinstance(n, kinds) for n in row.values())]


@dataclass
class Metrics:
    """Writes a run's rows to metrics.jsonl, and says those of updates on the console.

    Rows of updates hold step, loss, lr, grad_norm, tokens_per_second and (given a peak) mfu; rows
    of evaluations hold step, train_loss, val_loss and bits_per_byte. Update number s, from 0,
    has step s, and an evaluation the number of updates before it: each step comes once per kind.
    """

    path: Path
    start: int  # the step to continue from: what the file says of later ones is forgotten
    evaluated: int  # the last step evaluated before; the same holds
    max_iters: int
    eval_interval: int
    log_interval: int
    tokens_per_update: int
    flops_per_token: float
    peak: float | None = None  # FLOP/s of the GPU, for its utilization (MFU)
    also: tuple[Callable[[dict], None], ...] = ()  # called with each row

    def __post_init__(self):
        start = {"loss": self.start, "val_loss": self.evaluated + 1}
        rows = read_metrics(self.path)
        kept = [
            row for row in rows if all(row["step"] < start[key] for key in start if key in row)
        ]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.updates, self.seconds, self.evaluation_seconds = 0, 0.0, 0.0

    def update(
        self, step: int, *, loss: float, lr: float, grad_norm: float, seconds: float
    ) -> None:
        """Note an update; every log_interval of them, write it and print it with the speed."""
        self.updates += 1
        self.seconds += seconds
        if step % self.log_interval and step + 1 != self.max_iters:
            return
        speed = self.updates * self.tokens_per_update / self.seconds
        row = {"step": step, "loss": loss, "lr": lr, "grad_norm": grad_norm}
        row["tokens_per_second"] = speed
        line = f"step {step:6d} | loss {loss:7.4f} | lr {lr:.2e} | norm {grad_norm:6.3f}"
        line += f" | {speed:9,.0f} tok/s"
        if self.peak:
            row["mfu"] = speed * self.flops_per_token / self.peak
            line += f" | mfu {row['mfu']:.1%}"
        if step > self.start:  # the first update says nothing of the speed: it may have compiled
            line += f" | {duration(self.seconds_left(step))} left"
        print(line, flush=True)
        self._write(row)
        self.updates, self.seconds = 0, 0.0

    def seconds_left(self, step: int) -> float:
        """How long the run still takes, judging by the updates since the last line."""
        evaluations = self.max_iters // self.eval_interval - (step + 1) // self.eval_interval
        updates = self.max_iters - step - 1
        return updates * self.seconds / self.updates + evaluations * self.evaluation_seconds

    def evaluation(self, step: int, *, seconds: float, **losses: float) -> None:
        """Note an evaluation and how long it took."""
        self.evaluation_seconds = seconds
        self._write({"step": step, **losses})

    def _write(self, row: dict) -> None:
        plain = {key: n if math.isfinite(n) else None for key, n in row.items()}  # JSON has no NaN
        append_text(self.path, json.dumps(plain) + "\n")
        for call in self.also:
            call(row)


def wandb_log(project: str, name: str, config: dict) -> Callable[[dict], None]:
    """A function that sends a row of metrics to Weights & Biases."""
    try:
        import wandb
    except ImportError:
        raise ValueError("wandb_log=True needs the package wandb: pip install wandb") from None
    run = wandb.init(project=project, name=name, config=config)
    return lambda row: run.log(row, step=row["step"])


def draw_losses(metrics: Path, picture: Path, *, title: str) -> bool:
    """Draw the losses of a metrics.jsonl as a PNG, if matplotlib is installed; returns whether."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = read_metrics(metrics)
    updates = [row for row in rows if row.get("loss") is not None]
    evaluations = [row for row in rows if None not in map(row.get, ("train_loss", "val_loss"))]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [row["step"] for row in updates], [row["loss"] for row in updates],
        color="0.75", linewidth=1, label="each logged update",
    )  # fmt: skip
    for key, color, label in (
        ("train_loss", "C0", "training text"),
        ("val_loss", "C1", "validation text"),
    ):
        steps, losses = [row["step"] for row in evaluations], [row[key] for row in evaluations]
        axes.plot(steps, losses, "o-", color=color, markersize=4, label=label)
    if evaluations:
        last = evaluations[-1]
        axes.annotate(
            f"{last['val_loss']:.3f}", (last["step"], last["val_loss"]),
            xytext=(0, 8), textcoords="offset points", ha="center", color="C1",
        )  # fmt: skip
    axes.set(xlabel="update", ylabel="loss, nats per token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    with whole_file(picture) as file:
        figure.savefig(file, format="png", dpi=120)
    return True
