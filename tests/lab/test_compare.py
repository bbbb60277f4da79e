"""Laws of the comparison of runs: what table, picture and page say of their folders."""

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from nanolm.lab.compare import PAGE, PICTURE, differences, draw, main, samples
from nanolm.lab.trained import common_loss, open_run
from nanolm.runs.settings import TrainConfig
from nanolm.system.files import lock

SHAPE = {"vocab_size": 11, "block_size": 5, "n_layer": 1, "n_head": 1, "n_embd": 4}
BATCH = {"batch_size": 3, "gradient_accumulation_steps": 2}


def rows_of(losses, *, every=2, seconds=3.0, **scores) -> list[dict]:
    """What a run logs that is evaluated after every two updates, each of so many seconds."""
    rows = []
    for step, loss in enumerate(losses):
        if step % every == 0:
            row = {"step": step, "train_loss": loss, "val_loss": loss + 0.5, **scores}
            rows += [{**row, "seconds": step * seconds, "sample": f"<b>{step}"}]
        row = {"step": step, "loss": loss, "lr": 0.1, "grad_norm": 1.0, "tokens_per_second": 9.0}
        rows += [{**row, "seconds": (step + 1) * seconds}]
    return rows


def make(name, rows=None, *, tokenizer="{}", **keys):
    """A run's folder below out/."""
    folder = Path("out", name)
    folder.mkdir(parents=True)
    config = TrainConfig(**{**SHAPE, **BATCH, "max_iters": 6, "dataset": "text", **keys})
    record = {"config": asdict(config), "engine": {"device": "cpu"}}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "nanolm_tokenizer.json").write_text(tokenizer)
    rows = rows_of([3.0, 2.5, 2.0, 1.75]) if rows is None else rows
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_run(folder)


def lines_of(axes) -> list[list]:
    """The points of each line that is more than a name."""
    return [line.get_xydata().tolist() for line in axes.lines if len(line.get_xydata())]


# ------------------------------------------------------------------------------------------
# What is compared


def test_curves_run_over_updates_tokens_and_time(workplace):
    """Tokens: 3 x 5 x 2 of an update. An update's loss is that before it, at the time it began."""
    figure = draw([make("a"), make("b", rows_of([3.0, 2.0], seconds=7.0))], "val_loss")
    panels = [lines_of(axes) for axes in figure.axes]
    updates, losses = [0.0, 1.0, 2.0, 3.0], [3.0, 2.5, 2.0, 1.75]
    for panel, unit in zip(panels, (1, 30, 3.0), strict=False):
        assert panel[0] == [
            [step * unit, loss] for step, loss in zip(updates, losses, strict=True)
        ]
        assert panel[1] == [[0, 3.5], [2 * unit, 2.5]]
    assert panels[2][2] == [[0, 3.0], [7.0, 2.0]]
    assert panels[3][0] == [[step, 0.1] for step in updates]
    assert panels[4][0] == [[step, 1.0] for step in updates]
    assert panels[5][0] == [[step, 9.0] for step in updates]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


@pytest.mark.parametrize(
    ("bits", "keys", "key", "said"),
    [
        (True, {}, "val_loss", ""),
        (False, {}, "val_loss", ""),
        (True, {"tokenizer": "[]"}, "bits_per_byte", "vocabularies.*Bits per byte of text do"),
        (
            False,
            {"tokenizer": "[]"},
            "val_loss",
            "vocabularies: losses of a token do not compare.$",
        ),
        (True, {"task": "masked"}, "val_loss", r"tasks \(causal, masked\).*do not compare"),
        (True, {"dataset": "other"}, "val_loss", r"validation texts \(other, text\)"),
    ],
    ids=["same", "no bits", "tokens", "tokens, no bits", "task", "text"],
)
def test_losses_are_compared_only_where_they_can_be(bits, keys, key, said, workplace):
    scores = {"bits_per_byte": 1.25}
    first = make("a", rows_of([3.0] * 4, **scores))
    other = make("b", rows_of([3.0] * 4, **scores if bits else {}), **keys)
    found, notes = common_loss([first, other])
    assert found == key
    assert re.search(said, " ".join(notes)) if said else notes == []


def test_in_bits_per_byte_no_loss_of_a_token_is_drawn(workplace):
    runs = [make(name, rows_of([3.0] * 4, bits_per_byte=1.25)) for name in "ab"]
    for axes in draw(runs, "bits_per_byte").axes[:3]:
        assert {y for line in lines_of(axes) for _, y in line} == {1.25}


def test_the_keys_that_differ_are_those_that_are_listed(workplace):
    runs = [make("a", out_dir="out/a"), make("b", learning_rate=1e-3), make("c", seed=7)]
    text = (runs[2].folder / "run.json").read_text()
    (runs[2].folder / "run.json").write_text(text.replace('"device": "cpu"', '"device": "cuda"'))
    assert differences(runs) == [
        ["seed", "1337", "1337", "7"],
        ["learning_rate", "0.0006", "0.001", "0.0006"],
        ["device", "cpu", "cpu", "cuda"],
    ]


def test_samples_stand_side_by_side_at_equal_steps(workplace):
    runs = [make("a", rows_of([1.0] * 9)), make("b", rows_of([1.0] * 9, every=4)), make("c", [])]
    assert list(samples(runs)) == [
        ("the last of each", ["<b>8", "<b>8", "-"]),
        ("after 8 updates", ["<b>8", "<b>8", "-"]),
        ("after 4 updates", ["<b>4", "<b>4", "-"]),
        ("after 0 updates", ["<b>0", "<b>0", "-"]),
    ]
    assert len(list(samples(runs[:1]))) == 6


# ------------------------------------------------------------------------------------------
# The table


def test_a_run_is_running_stopped_or_finished(workplace):
    """A finished one need not be the last to have written."""
    run, last = make("a"), {"step": 6, "train_loss": 1.0, "val_loss": 1.0}
    with lock(run.folder):
        assert run.state() == "running"
    assert run.state() == "stopped"
    with lock(run.folder):
        pass  # looking at a run does not keep it from going on
    assert make("b", [*rows_of([3.0] * 6), last]).state() == "finished"


def test_a_line_that_is_half_written_is_none(workplace):
    run = make("a")
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 1.')
    assert open_run(run.folder).rows == run.rows
    name, task, _, updates, *losses, time, _ = run.cells()
    assert (name, task, updates, time) == ("a", "causal", "4 of 6", "12s")
    assert losses == ["2.5000", "-"]


def test_without_a_name_all_runs_are_listed(workplace, capsys):
    make("a")
    make("b", [], max_iters=1234)
    Path("out/c").mkdir()
    Path("out/c/metrics.jsonl").touch()
    main([])
    warning, _, *lines = capsys.readouterr().out.splitlines()
    assert warning.startswith("warning: out/c has no run.json")
    assert [line.split()[0] for line in lines] == ["a", "b"]
    assert "0 of 1,234" in lines[1]
    assert list(Path().iterdir()) == [Path("out")]  # nothing is written


def test_the_size_is_that_of_the_model(tiny_run):
    from nanolm.model import count_parameters
    from nanolm.runs.load import load_model

    size = count_parameters(load_model(tiny_run)[0])
    run = open_run(tiny_run)
    assert run.cells()[2:4] == [f"{size:,}", "4 of 4"]
    assert run.state() == "finished"
    assert run.cells()[6] != "-"
    assert [title for title, _ in samples([run])][1:] == [f"after {n} updates" for n in (4, 2, 0)]


# ------------------------------------------------------------------------------------------
# The page and the command


def test_the_page_holds_all_and_needs_nothing_else(workplace, capsys):
    make("a&b", learning_rate=1e-3)
    make("other")
    main(["out/a&b", "out/other", "out/other/", "--folder=out"])
    page = Path("out", PAGE).read_text()
    assert Path("out", PICTURE).read_bytes().startswith(b"\x89PNG")
    assert re.findall(r'(?:src|href)="(?!#)|@import|url\((?!#)|<script', page) == []
    assert "<svg" in page
    assert "#000000" not in page  # which a dark page would hide
    assert "prefers-color-scheme: dark" in page
    for text in ("a&amp;b", "<pre>&lt;b&gt;2</pre>", "<td><span>learning_rate</span></td>", "12s"):
        assert text in page
    assert "<b>" not in page
    assert "$" not in page
    assert "seed" not in page
    head, *rows, written = capsys.readouterr().out.splitlines()
    shown = (ROOT / "docs/runs.md").read_text()
    assert re.sub(" +", " ", head) in re.sub(" +", " ", shown)
    assert written.replace("out/", "") in shown
    assert [row.split()[0] for row in rows] == ["a&b", "other"]
    assert written == "written    out/compare.html and out/compare.png"


def test_eleven_runs_look_different_and_those_of_one_name_are_told_apart(workplace, monkeypatch):
    """Also those that have logged nothing."""
    for i in range(10):
        make(f"{i}", [] if i % 2 else None)
    Path("elsewhere").mkdir()
    Path("out/0").rename("elsewhere/1")
    make("0")
    runs = []
    monkeypatch.setattr("nanolm.lab.compare.page_of", lambda found, *_: runs.extend(found) or "")
    main([*(f"out/{i}" for i in range(10)), "elsewhere/1"])
    assert [run.name for run in runs][:3] == ["0", "out/1", "2"]
    assert runs[-1].name == "elsewhere/1"
    names = {line.get_label(): line for line in draw(runs, "val_loss").axes[0].lines}
    styles = [(names[run.name].get_color(), names[run.name].get_linestyle()) for run in runs]
    assert len(set(styles)) == 11


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["out/none"], "out/none is no folder, so it is not a run: choose from out/a, out/bad"),
        (["out/empty"], "out/empty has no run.json, so it is not a run: choose from out/a"),
        (["out/new"], "out/new has no metrics.jsonl, so it is not a run: choose from"),
        (["out/bad"], "out/bad/run.json is damaged"),
        (["out/a", "--folder=none"], "folder='none' is no folder: make it, or name another"),
        (["out/a", "--fodler=x"], "folder"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_one_line(words, said, workplace):
    make("a")
    (make("new").folder / "metrics.jsonl").unlink()
    (make("bad").folder / "run.json").write_text("{")
    Path("out/empty").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(said)) as error:
        main(words)
    assert "\n" not in str(error.value)


def test_without_runs_or_matplotlib_it_says_what_to_do(workplace, monkeypatch):
    with pytest.raises(FileNotFoundError, match=re.escape("no run in out/: train one")):
        main([])
    make("a")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        main(["out/a"])


def test_a_run_that_says_no_time_has_none(workplace):
    rows = [{k: row[k] for k in row if k != "seconds"} for row in rows_of([3.0, 2.0, 1.0])]
    run = make("a", rows)
    assert run.cells()[-2] == "-"
    assert np.isnan(run.along("time", np.array([2.0]))).all()
