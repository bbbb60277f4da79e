"""Pictures of a run."""

from pathlib import Path

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
            f"{last['val_loss']:.3f}", (last["step"], last["val_loss"]),
            xytext=(0, 8), textcoords="offset points", ha="center", color="C1",
        )  # fmt: skip
    axes.set(xlabel="update", ylabel="loss, nats per token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    with whole_file(picture) as file:
        figure.savefig(file, format="png", dpi=120)
    return True
