"""Pictures of what the page shows of a model and a text (see look.py for the data)."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanolm.system.files import whole_file

PICTURES = [f"attention-{kind}.png" for kind in ("text", "source", "cross")]
PICTURES += ["surprise.png", "layers.png", "shares.png"]
READABLE = 64  # tokens, at most, that are named in a picture; of longer texts, the first so many


def draw(data: dict[str, Any], folder: Path) -> None:
    """Draw all that there is, as PNGs in the folder; nothing where matplotlib is not installed.

    Those of another model, which were there before, do not stay.
    """
    for name in PICTURES:
        (folder / name).unlink(missing_ok=True)
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return
    text = data["texts"]["text"]
    for kind, packed in data["attention"].items():
        draw_attention(packed, folder / f"attention-{kind}.png")
    names = [data["vocabulary"][i][0].replace("$", r"\$") for i in text["ids"][:READABLE]]
    if "surprise" in text:
        draw_bars(names, text["surprise"], "surprise (nats)", folder / "surprise.png")
        draw_lens(names, text["lens"], data["vocabulary"], folder / "layers.png")
    if "shares" in text:
        label = text["labels"][int(np.argmax(text["probabilities"][0]))]
        draw_bars(names, text["shares"][0], f"adds to log p({label})", folder / "shares.png")


def save(figure: Any, picture: Path) -> None:
    """Write a picture, whole or not at all."""
    with whole_file(picture) as file:
        figure.savefig(file, format="png", dpi=120)


def draw_attention(packed: dict[str, Any], picture: Path) -> None:
    """Draw the map of each head, a row for each layer; darker is more, by the root."""
    from matplotlib.figure import Figure

    n_layer, n_head, *_ = packed["shape"]
    weights = np.frombuffer(base64.b64decode(packed["map"]), np.uint8) / 255
    size = [-(-n // packed["step"]) for n in packed["shape"][2:4]]
    maps = weights.reshape(n_layer, n_head, *size)
    figure = Figure(figsize=(1 + 1.6 * n_head, 1 + 1.6 * n_layer), layout="constrained")
    for i, axes in enumerate(figure.subplots(n_layer, n_head, squeeze=False).flat):
        layer, head = divmod(i, n_head)
        axes.imshow(np.sqrt(maps[layer, head]), cmap="Oranges", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(f"layer {layer + 1}, head {head + 1}", size=8)
    figure.supxlabel("looked at", size=9)
    figure.supylabel("looks", size=9)
    save(figure, picture)


def draw_bars(names: Sequence[str], heights: Sequence[float], what: str, picture: Path) -> None:
    """Draw a bar for each token."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 + 0.28 * len(names), 3.2), layout="constrained")
    axes, places = figure.subplots(), range(len(names))
    heights = [height or 0 for height in heights[: len(names)]]  # none for the first token
    axes.bar(places, heights, color=["C1" if height >= 0 else "C0" for height in heights])
    axes.set_xticks(places, map(repr, names), rotation=90, family="monospace", size=8)
    axes.set(ylabel=what, xlim=(-0.6, len(names) - 0.4))
    axes.grid(axis="y", alpha=0.3)
    save(figure, picture)


def draw_lens(
    names: Sequence[str], lens: Sequence[list], vocabulary: dict[int, list], picture: Path
) -> None:
    """Draw the likeliest guess for each token after each layer, and how likely it is."""
    from matplotlib.figure import Figure

    best = [[row[0] if row else (None, 0.0) for row in each[: len(names)]] for each in lens]
    figure = Figure(figsize=(2 + 0.62 * len(names), 1.5 + 0.32 * len(best)), layout="constrained")
    axes = figure.subplots()
    p = np.array([[share for _, share in each] for each in best])
    axes.imshow(p, cmap="Oranges", vmin=0, vmax=1, aspect="auto", origin="lower")
    for layer, place in np.ndindex(*p.shape):
        i = best[layer][place][0]
        word = "" if i is None else vocabulary[i][0].replace("$", r"\$")
        color = "white" if p[layer, place] > 0.6 else "black"
        short = repr(word)[1:-1][:7]
        axes.text(place, layer, short, ha="center", va="center", size=7, color=color)
    axes.set_xticks(range(len(names)), map(repr, names), rotation=90, family="monospace", size=8)
    axes.set_yticks(range(len(best)), ["before", *range(1, len(best))])
    axes.set(xlabel="the token", ylabel="guess after layer")
    save(figure, picture)
