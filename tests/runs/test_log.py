"""Laws of the log."""

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from nanolm.runs.log import (
    Log,
    duration,
    peak_flops,
    read_metrics,
    scores_of,
    wandb_log,
)
from nanolm.runs.pictures import draw_confusion, draw_losses
from nanolm.runs.settings import TrainConfig

CONFIG = TrainConfig(
    max_iters=20,
    eval_interval=5,
    log_interval=2,
    batch_size=10,
    block_size=10,
    gradient_accumulation_steps=1,
)


def log(path, start=0, **keys) -> Log:
    return Log(path, CONFIG, start, evaluated=start, flops_per_token=10.0, **keys)


def write_run(metrics, first, last):
    """What a loop reports."""
    for step in range(first, last):
        metrics.update(step, loss=4.0 - step / 10, lr=0.1, grad_norm=1.0, seconds=0.5, tokens=100)
        if (step + 1) % 5 == 0:
            metrics.evaluation(step + 1, {"train_loss": 3.0, "val_loss": 3.5}, seconds=1.0)


def test_each_step_comes_once_per_kind(tmp_path):
    metrics = log(tmp_path / "m")
    metrics.evaluation(0, {"train_loss": 4.0, "val_loss": 4.0}, seconds=1.0)
    write_run(metrics, 0, 20)
    rows = read_metrics(tmp_path / "m")
    assert [row["step"] for row in rows if "loss" in row] == [*range(0, 20, 2), 19]
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 5, 10, 15, 20]


def test_a_resumed_log_forgets_what_came_after_its_checkpoint(tmp_path):
    write_run(log(tmp_path / "whole"), 0, 20)
    write_run(log(tmp_path / "cut"), 0, 17)
    with open(tmp_path / "cut", "a") as file:
        file.write('{"step": 17, "lo')  # killed while writing
    write_run(log(tmp_path / "cut", start=10), 10, 20)
    assert read_metrics(tmp_path / "cut") == read_metrics(tmp_path / "whole")


def test_seconds_are_those_of_all_updates_that_count(tmp_path):
    """Of a run that was stopped, too; evaluations and lost updates are not in them."""
    write_run(log(tmp_path / "m"), 0, 17)
    write_run(log(tmp_path / "m", start=10), 10, 20)
    rows = read_metrics(tmp_path / "m")
    assert [row["seconds"] for row in rows] == [
        (row["step"] + ("loss" in row)) * 0.5 for row in rows
    ]


def test_a_sample_is_kept_with_its_evaluation(tmp_path, capsys):
    text = 'a "text"\n of lines\u2028and signs'
    metrics = log(tmp_path / "m")
    scores, sample = {"train_loss": 3.0, "val_loss": 3.5}, ("the model writes", text)
    metrics.evaluation(5, scores, seconds=1.0, sample=sample)
    [row] = read_metrics(tmp_path / "m")
    assert row == {"step": 5, **scores, "seconds": 0.0, "sample": text}
    shown = capsys.readouterr().out.split("\n")[1:]
    assert shown == [
        "    the model writes:",
        '    | a "text"',
        "    |  of lines\u2028and signs",
        "",
    ]
    assert scores_of({**row, "perplexity": 9.0}) == {"perplexity": 9.0}


@pytest.mark.parametrize(
    "line", ['{"step": 1, "loss": "4"}', '{"step": 1, "sample": 3}', "[1]", "{"]
)
def test_what_is_no_row_is_left_out(line, tmp_path):
    (tmp_path / "m").write_text(f'{line}\n{{"step": 2, "loss": 1.0}}\n')
    assert read_metrics(tmp_path / "m") == [{"step": 2, "loss": 1.0}]


def test_speed_time_left_and_utilization_leave_evaluations_apart(tmp_path, capsys):
    metrics = log(tmp_path / "m", peak=40_000.0)
    write_run(metrics, 0, 9)
    row = [row for row in read_metrics(tmp_path / "m") if "loss" in row][-1]
    assert row["tokens_per_second"] == pytest.approx(200)  # 100 tokens in half a second
    assert row["mfu"] == pytest.approx(200 * 10 / 40_000)
    lines = capsys.readouterr().out.splitlines()
    assert "left" not in lines[0]  # the first update may have compiled
    # after update 8 there are 11 updates of 0.5 s and 3 evaluations of 1 s to come
    assert lines[-1].endswith("| mfu 5.0% | 8s left")


def test_without_a_known_peak_there_is_no_utilization(tmp_path, capsys):
    write_run(log(tmp_path / "m"), 0, 3)
    assert "mfu" not in capsys.readouterr().out
    assert not any("mfu" in row for row in read_metrics(tmp_path / "m"))


def test_every_row_is_passed_on(tmp_path):
    rows = []
    write_run(log(tmp_path / "m", also=(rows.append,)), 0, 20)
    assert rows == read_metrics(tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L4", 121e12)]
    + [("NVIDIA L40S", 362e12), ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA A10G", 125e12)]
    + [("NVIDIA H200", 989e12), ("Tesla V100-SXM2-16GB", 125e12), ("Some GPU", None)],
)
def test_peaks_are_found_by_the_name_of_the_gpu(name, peak):
    assert peak_flops(name) == peak


@given(st.floats(0, 10**6))
def test_a_duration_is_said_to_the_last_unit_that_matters(seconds):
    text = duration(seconds)
    parts = dict(zip("hms", [0, 0, 0], strict=True))
    number = ""
    for character in text:
        if character.isdigit():
            number += character
        else:
            parts[character], number = int(number), ""
    said = parts["h"] * 3600 + parts["m"] * 60 + parts["s"]
    assert abs(said - seconds) <= (60 if parts["h"] else 0.5)
    assert parts["m"] < 60
    assert parts["s"] < 60


def drawn(folder, rows, monkeypatch, **keys) -> list:
    """The two panels of the picture of a run with these rows."""
    figures = []
    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, file, **_: figures.append(figure))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert draw_losses(folder, replace(CONFIG, vocab_size=55, **keys), title="a run")
    figures[0].draw_without_rendering()  # of which a warning is an error
    return figures[0].axes


def lines_of(axes) -> dict:
    """The points (N, 2) of each line, by its label."""
    return {line.get_label(): line.get_xydata() for line in axes.lines}


def evaluations(losses, every=5) -> list[dict]:
    steps = range(0, every * len(losses), every)
    return [
        {"step": n, "train_loss": 3.0, "val_loss": v} for n, v in zip(steps, losses, strict=True)
    ]


def updates(losses) -> list[dict]:
    return [{"step": n, "loss": loss, "lr": 0.1} for n, loss in enumerate(losses)]


def test_the_picture_marks_the_best_evaluation_the_checkpoints_and_a_blind_guess(
    tmp_path, monkeypatch
):
    """That of step 0 is no checkpoint, however good it is."""
    for name in ("step_00000010.pt", "step_00000015.pt", "step_00000005.pt.bad"):
        (tmp_path / name).touch()
    rows = updates([4.0] * 15) + evaluations([3.1, 3.5, 3.25, 3.75])
    above, below = drawn(tmp_path, rows, monkeypatch)
    lines = lines_of(above)
    assert lines["the best: best.pt"].tolist() == [[10, 3.25]]
    assert lines["checkpoint kept"][:, 0].tolist() == [10, 15]
    assert set(lines["a blind guess"][:, 1]) == {math.log(55)}
    said = [text.get_text() for text in above.texts]
    assert said == [f"blind: {math.log(55):.4g}", "best: 3.25"]
    assert len(below.lines[0].get_xydata()) == 15
    legend = {text.get_text() for text in above.figure.legends[0].get_texts()}
    assert legend == lines.keys()
    assert above.get_legend() is below.get_legend() is None  # which would hide lines


def test_the_picture_marks_what_another_score_finds_best(tmp_path, monkeypatch):
    rows = evaluations([3.1, 3.5, 3.25])
    for row, f1 in zip(rows, [0.9, 0.75, 0.5], strict=True):
        row["macro_f1"] = f1
    keys = {"task": "classification", "best_by": "macro_f1", "head": "text"}
    above, _ = drawn(tmp_path, rows, monkeypatch, labels=("a", "b", "c"), **keys)
    said = [text.get_text() for text in above.texts]
    assert said == ["blind: 1.099", "best: 3.5 (macro_f1 0.75)"]


def test_a_few_losses_far_above_the_rest_do_not_squeeze_it(tmp_path, monkeypatch):
    rows = updates([900.0] + [3.0 - n / 400 for n in range(400)]) + evaluations([2.9, 2.8])
    above, _ = drawn(tmp_path, rows, monkeypatch)
    assert above.get_ylim()[1] < 5
    assert above.get_yscale() == "linear"
    above, _ = drawn(tmp_path, updates([0.01 + 4 * 0.9**n for n in range(99)]), monkeypatch)
    assert above.get_yscale() == "log"


@pytest.mark.parametrize(
    "rows",
    [
        [],
        updates([4.0]),
        updates([None]),
        updates([4.0, None, None, 3.0]),
        updates([0.0, 0.0]),
        evaluations([4.0]),
        evaluations([4.0, None]),
        updates([4.0] * 7) + evaluations([4.0, 3.0]) + updates([9.0] * 9)[5:],
    ],
    ids=["none", "one", "skipped", "gap", "zero", "evaluation", "infinite", "resumed"],
)
def test_the_picture_is_drawn_of_whatever_a_run_has_come_to(rows, tmp_path, monkeypatch):
    above, _ = drawn(tmp_path, rows, monkeypatch)
    n = sum(row.get("loss") is not None for row in rows)
    lines = lines_of(above)
    assert np.isfinite(lines.get("each logged update", np.zeros((0, 2)))[:, 1]).sum() == n
    low, high = above.get_xlim()
    assert low < 0 < high


def test_a_picture_is_a_whole_png(tmp_path):
    write_run(log(tmp_path / "metrics.jsonl"), 0, 10)
    assert draw_losses(tmp_path, replace(CONFIG, vocab_size=55), title="a run")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_no_picture_and_no_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not draw_losses(tmp_path, CONFIG, title="a run")
    assert list(tmp_path.iterdir()) == []


def test_rows_are_sent_to_weights_and_biases_under_the_name_of_the_run(monkeypatch):
    """A stand-in for the package notes what it is given."""
    sent = []

    class Wandb:
        def init(self, **keys):
            sent.append(keys)
            return self

        def log(self, row, step):
            sent.append((row, step))

    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    config = {"wandb_run_name": None, "n_layer": 1}
    wandb_log("nanolm", "pydocs", config)({"step": 3, "loss": 1.0})
    assert sent[0] == {"project": "nanolm", "name": "pydocs", "config": config}
    assert sent[1] == ({"step": 3, "loss": 1.0}, 3)


def test_a_confusion_is_drawn_with_many_labels_and_without_any_example(tmp_path):
    for n in (2, 30):
        draw_confusion(np.zeros((n, n)), [f"label {i}" for i in range(n)], tmp_path / f"{n}.png")
        assert (tmp_path / f"{n}.png").read_bytes().startswith(b"\x89PNG")
