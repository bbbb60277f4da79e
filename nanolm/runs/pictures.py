"""Pictures of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanolm.runs.checkpoint import step_files, step_of
from nanolm.runs.folder import METRICS_FILE, PICTURE
from nanolm.runs.log import best_evaluation, read_metrics
from nanolm.runs.settings import TrainConfig
from nanolm.system.files import whole_file

LOG_FROM = 3  # an axis is logarithmic where the largest loss is so many times the smallest


def draw_losses(folder: Path, config: TrainConfig, *, title: str) -> bool:
    """Draw the losses and the learning rate of the run in a folder as a PNG there.

    config: that of run.json, which knows the vocabulary. Returns False without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = read_metrics(folder / METRICS_FILE)
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    plot(above, series(rows, "loss"), color="0.7", linewidth=1, label="each logged update")
    plot(above, series(rows, "train_loss"), color="C0", marker="o", label="training text")
    plot(above, series(rows, "val_loss"), color="C1", marker="o", label="validation text")
    losses = [series(rows, key)[:, 1] for key in ("loss", "train_loss", "val_loss")]
    show_most(above, np.concatenate(losses), line=config.blind_loss)
    mark_blind_guess(above, config.blind_loss)
    plot(below, series(rows, "lr"), color="C2")
    above.set(ylabel="loss (nats)", title=title)
    below.set(xlabel="update", ylabel="learning rate", ylim=(0, None))
    below.yaxis.set_major_formatter("{x:g}")
    below.xaxis.set_major_formatter("{x:,.0f}")
    below.xaxis.get_major_locator().set_params(integer=True)
    mark_checkpoints(above, [step_of(path) for path in step_files(folder)])
    last = max((row["step"] for row in rows), default=0) or 1
    above.set_xlim(-0.03 * last, 1.03 * last)
    for axes in (above, below):
        axes.grid(alpha=0.3)
    mark_best(above, rows, config)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    with whole_file(folder / PICTURE) as file:
        figure.savefig(file, format="png", dpi=120)
    return True


def series(rows: Sequence[dict], key: str) -> np.ndarray:
    """The steps and numbers (N, 2) of the rows that have the key; NaN where one was not finite."""
    pairs = [(row["step"], row[key]) for row in rows if key in row]
    return np.array(pairs, dtype=float).reshape(-1, 2)


def plot(axes: Any, pairs: np.ndarray, **style: object) -> None:
    """Draw a line through the pairs (N, 2), with gaps at NaN; nothing if there is no more."""
    if np.isfinite(pairs[:, 1]).any():
        if len(pairs) == 1:  # of which a line shows nothing
            style["marker"] = "o"
        axes.plot(*pairs.T, **{"markersize": 4, **style})


def show_most(axes: Any, numbers: np.ndarray, *, line: float | None = None) -> None:
    """Let the axis show these numbers (N,), but for the few largest; and a line, if it is near.

    The first losses of a run, or a single bad one, can lie far above all others, and would squeeze
    them flat.
    """
    numbers = numbers[np.isfinite(numbers)]
    if line is not None:
        numbers = np.append(numbers, line)
    if not len(numbers):
        return
    low, high = numbers.min(), np.quantile(numbers, 0.98)
    if line is not None and line < 1.5 * high:
        high = max(high, line)
    if low > 0 and high > LOG_FROM * low:
        axes.set_yscale("log", subs=(2, 3, 4, 6, 8))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        margin = (high / low) ** 0.06
        axes.set_ylim(low / margin, high * margin)
    else:
        margin = 0.06 * (high - low or high or 1)
        axes.set_ylim(low - margin, high + margin)


def mark_blind_guess(axes: Any, loss: float) -> None:
    """A line for the loss of a blind guess; where that is out of sight, a word at the edge."""
    top = axes.get_ylim()[1]
    axes.axhline(loss, color="0.4", linestyle="--", linewidth=1, label="a blind guess")
    text = f"blind: {loss:.4g}" + ("" if loss < top else " (above)")
    place = {"xytext": (-4, -3), "xycoords": ("axes fraction", "data")}
    note(axes, text, (1, min(loss, top)), "0.3", ha="right", va="top", **place)


def note(axes: Any, text: str, xy: tuple[float, float], color: str, **place: object) -> None:
    """A word beside a point, on a ground through which the lines are faint."""
    ground = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1}
    axes.annotate(text, xy, color=color, textcoords="offset points", bbox=ground, **place)


def mark_best(axes: Any, rows: Sequence[dict], config: TrainConfig) -> None:
    """Mark the evaluation that best.pt comes from, with its loss, and the score that chose it."""
    best, by = best_evaluation(rows, config), config.best_by
    if best is None:
        return
    place, text = (best["step"], best["val_loss"]), f"best: {best['val_loss']:.4g}"
    if by != "loss":
        text += f" ({by} {best[by]:.4g})"
    axes.plot(*place, "oC3", markersize=9, fillstyle="none", label="the best: best.pt")
    side = "right" if best["step"] > sum(axes.get_xlim()) / 2 else "left"
    note(axes, text, place, "C3", xytext=(0, 10), ha=side)


def mark_checkpoints(axes: Any, steps: Sequence[int]) -> None:
    """A tick on the lower edge for each step that can be resumed."""
    if steps:
        place = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        axes.plot(steps, [0] * len(steps), "k|", markersize=10, label="checkpoint kept", **place)


def draw_confusion(matrix: np.ndarray, labels: Sequence[str], picture: Path) -> None:
    """Draw which label (row) was taken for which (column), in shares of each row, as a PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    shares = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
    size = 2.5 + 0.45 * min(len(labels), 40)
    figure = Figure(figsize=(size + 0.5, size), layout="constrained")
    axes, places = figure.subplots(), range(len(labels))
    figure.colorbar(axes.imshow(shares, cmap="Blues", vmin=0, vmax=1), shrink=0.8)
    rows = [f"{label} ({n:,.0f})" for label, n in zip(labels, matrix.sum(axis=1), strict=True)]
    axes.set_xticks(places, labels, rotation=90)
    axes.set_yticks(places, rows)
    axes.set(xlabel="guessed", ylabel="label (how often)", title="validation, share of each label")
    for row, column in np.argwhere(shares >= 0.005) if len(labels) <= 20 else ():
        share = shares[row, column]
        color = "white" if share > 0.5 else "black"
        axes.text(column, row, f"{share:.2f}", ha="center", va="center", color=color, size=8)
    with whole_file(picture) as file:
        figure.savefig(file, format="png", dpi=120)
