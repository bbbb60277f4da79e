"""Pictures of a run."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nanolm.runs.log import read_metrics
from nanolm.system.files import whole_file


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
            f"{last['val_loss']:.4g}", (last["step"], last["val_loss"]),
            xytext=(0, 8), textcoords="offset points", ha="center", color="C1",
        )  # fmt: skip
    axes.set(xlabel="update", ylabel="loss (nats)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    with whole_file(picture) as file:
        figure.savefig(file, format="png", dpi=120)
    return True


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
