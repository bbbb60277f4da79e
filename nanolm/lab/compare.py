"""Training runs side by side: python -m nanolm.lab.compare out/ONE out/ANOTHER ...

Prints a table, and writes compare.html, a page that needs no other file, and compare.png: losses
by update, by token and by time, the learning rate, gradients, speed; what was configured
differently, and what the models wrote. A run that is still going is shown as it stands. Without a
run, the table is that of all in out/.
"""

import html
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from nanolm.lab.trained import HEADS, Trained, common_loss, open_run
from nanolm.runs.folder import METRICS_FILE, RUNS, recorded
from nanolm.runs.log import duration
from nanolm.runs.pictures import plot, series, show_most
from nanolm.system.config import split_arguments
from nanolm.system.files import whole_file, write_text
from nanolm.system.script import run_script

PAGE, PICTURE, TEMPLATE = "compare.html", "compare.png", Path(__file__).with_name("compare.html")
OTHERS = ("lr", "grad_norm", "tokens_per_second")
TITLES = {
    "val_loss": "validation loss (nats)",
    "bits_per_byte": "bits per byte of validation text",
    "lr": "learning rate",
    "grad_norm": "norm of the gradient",
    "tokens_per_second": "tokens per second",
}
# Of a loss that updates have, too, these are drawn, faint behind it.
LINES = {
    "val_loss": [("loss", {"linewidth": 1, "alpha": 0.3}), ("val_loss", {"marker": "o"})],
    "bits_per_byte": [("bits_per_byte", {"marker": "o"})],
}
SIZES = ((9, "B"), (6, "M"), (3, "k"), (0, ""))
SAY = {  # how an axis writes its numbers
    "updates": "{x:,.0f}",
    "tokens": lambda n, _: next(f"{n / 10**e:g}{s}" for e, s in SIZES if n >= 10**e or e == 0),
    "time": lambda seconds, _: duration(seconds),
}
PLACES = {"out_dir", "overwrite", "wandb_run_name"}  # keys that change nothing of what is trained


@dataclass(frozen=True)
class CompareConfig:
    """What there is to say beside the runs."""

    folder: str = "."  # where compare.html and compare.png are written


# ------------------------------------------------------------------------------------------
# The picture and the page


def draw(runs: Sequence[Trained], key: str) -> Any:
    """A matplotlib figure: the loss of that key along three axes, and what updates tell."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("comparing runs needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    panels = [(key, along) for along in ("updates", "tokens", "time")]
    panels += [(other, "updates") for other in OTHERS]
    for axes, (what, along) in zip(figure.subplots(2, 3).flat, panels, strict=True):
        numbers = []
        for i, run in enumerate(runs):
            style = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3]}
            axes.plot([], [], label=run.name, **style)  # names also a run with nothing to draw
            for name, line in LINES.get(what, [(what, {"linewidth": 1})]):
                steps, found = series(run.rows, name).T
                numbers.append(found)
                plot(axes, np.stack((run.along(along, steps), found), axis=1), **style, **line)
        if what in (key, "grad_norm"):
            show_most(axes, np.concatenate(numbers))
        else:
            axes.set_ylim(0, None)
            axes.yaxis.set_major_formatter("{x:,g}")
        axes.set(xlabel=f"{along} of training", ylabel=TITLES[what])
        axes.xaxis.get_major_locator().set_params(nbins=6)
        axes.xaxis.set_major_formatter(SAY[along])
        axes.grid(alpha=0.3)
    names = axes.get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=min(5, len(runs)), frameon=False)
    return figure


def svg_of(figure: Any) -> str:
    """The figure as SVG for a page, in the page's own color where it is black."""
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "nanolm"}):  # the same every time
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    text = file.getvalue()
    return text[text.index("<svg") :].replace("#000000", "currentColor")


def differences(runs: Sequence[Trained]) -> list[list[str]]:
    """Rows of a key and its value in each run, for all keys that are not the same in all."""
    found = []
    for run in runs:
        record = recorded(run.folder)
        also = record.get("engine", {}) | record.get("versions", {})
        found.append(record["config"] | also | {"processes": record.get("processes", "-")})
    keys = [key for key in dict.fromkeys(chain(*found)) if key not in PLACES]
    rows = [[key, *(str(keys_of.get(key, "-")) for keys_of in found)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def samples(runs: Sequence[Trained]) -> Iterator[tuple[str, list[str]]]:
    """A title, and what each run wrote then: at steps that two of them share, or one run's own."""
    kept = [{row["step"]: row["sample"] for row in run.rows if "sample" in row} for run in runs]
    counts = Counter(chain(*kept))
    yield "the last of each", [texts[max(texts)] if texts else "-" for texts in kept]
    for step in sorted(counts, reverse=True):
        if counts[step] >= min(2, len(runs)):
            yield f"after {step:,} updates", [texts.get(step, "-") for texts in kept]


def page_of(runs: Sequence[Trained], notes: Sequence[str], figure: Any) -> str:
    """The page, whole in itself."""
    names = [run.name for run in runs]
    written = [
        f"<details><summary>{title}</summary>{html_table(names, [texts], 'pre')}</details>"
        for title, texts in samples(runs)
    ]
    written[0] = written[0].replace("<details>", "<details open>")
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(", ".join(names)),
        notes="".join(f"<p>{html.escape(note)}</p>" for note in notes),
        runs=html_table(HEADS, [run.cells() for run in runs]),
        picture=svg_of(figure),
        keys=html_table(["key", *names], differences(runs)),
        samples="".join(written),
    )


def html_table(heads: Sequence[str], rows: Iterable[Sequence[str]], tag: str = "span") -> str:
    """A table in HTML, with each cell's text in the tag."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    lines = ["".join(f"<td><{tag}>{html.escape(c)}</{tag}></td>" for c in row) for row in rows]
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


# ------------------------------------------------------------------------------------------
# The command


def print_table(runs: Sequence[Trained]) -> None:
    """A line of each run, for the console."""
    rows = [HEADS, *(run.cells() for run in runs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *others = zip(row, widths, strict=True)
        print(f"{first[0]:{first[1]}}", *(f"{text:>{n}}" for text, n in others), sep="  ")


def print_all() -> None:
    """The table of all runs in out/. Raises FileNotFoundError where there is none."""
    runs = []
    for path in sorted(RUNS.glob(f"*/{METRICS_FILE}")):
        try:
            runs.append(open_run(path.parent))
        except (ValueError, OSError) as error:
            print(f"warning: {error}")
    if not runs:
        raise FileNotFoundError(f"no run in {RUNS}/: train one with train.py, or name its folder")
    print_table(runs)


def main(arguments: list[str]) -> None:
    """Compare the runs that are named; list those in out/ where none is."""
    words, keys = split_arguments(CompareConfig, arguments)
    folder = Path(CompareConfig(**keys).folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"folder={str(folder)!r} is no folder: make it, or name another")
    if not words:
        return print_all()
    runs = [open_run(path) for path in dict.fromkeys(map(Path, words))]
    often = Counter(run.name for run in runs)
    runs = [replace(run, name=str(run.folder)) if often[run.name] > 1 else run for run in runs]
    key, notes = common_loss(runs)
    print_table(runs)
    for note in notes:
        print(note)
    figure = draw(runs, key)
    with whole_file(folder / PICTURE) as file:
        figure.savefig(file, format="png", dpi=100)
    write_text(folder / PAGE, page_of(runs, notes, figure))
    print(f"written    {folder / PAGE} and {folder / PICTURE}")


if __name__ == "__main__":
    usage = "python -m nanolm.lab.compare [RUN ...] [--key=value ...]"
    run_script(main, usage, CompareConfig)
