"""Laws of the folder of a run: what is taken for its checkpoint, and what is left alone."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nanolm.runs.checkpoint import load, step_files
from nanolm.runs.folder import check_content, launch_of, remove_leftovers


def first_moment(saved: dict) -> dict:
    return saved["optimizer"]["state"][0]


def a_name(saved: dict) -> str:
    return next(iter(saved["model"]))


# Sound files with absurd contents, which somebody would have to make on purpose.
ABSURD = {
    "no optimizer": lambda saved: saved.pop("optimizer"),
    "no weights": lambda saved: saved.update(model=[]),
    "a weight less": lambda saved: saved["model"].pop(a_name(saved)),
    "a weight more": lambda saved: saved["model"].update(more=torch.ones(2)),
    "a whole number": lambda saved: saved["model"].update(
        {a_name(saved): torch.ones(29, 8).int()}
    ),
    "sparse": lambda saved: saved["model"].update({a_name(saved): torch.ones(29, 8).to_sparse()}),
    "not finite": lambda saved: saved["model"][a_name(saved)].fill_(math.nan),
    "a step below 0": lambda saved: saved.update(step=-1),
    "a best of nan": lambda saved: saved.update(best_val_loss=math.nan),
    "no device": lambda saved: saved["engine"].update(device=5),
    "many layers": lambda saved: saved["config"].update(n_layer=10**9),
    "wide": lambda saved: saved["config"].update(n_embd=16),
    "no width": lambda saved: saved["config"].update(n_embd=None),
    "no moments of one": lambda saved: saved["optimizer"]["state"].pop(0),
    "half of the moments": lambda saved: first_moment(saved).pop("exp_avg"),
    "a moment of no shape": lambda saved: first_moment(saved).update(exp_avg=torch.tensor(1.0)),
    "a memory more": lambda saved: first_moment(saved).update(more=torch.ones(29, 8)),
    "a step of -1": lambda saved: first_moment(saved).update(step=torch.tensor(-1.0)),
    "a step of many": lambda saved: first_moment(saved).update(step=torch.ones(2)),
    "another optimizer": lambda saved: saved["config"].update(optimizer="sgd"),
    "AdamW's groups": lambda saved: saved["config"].update(optimizer="adamw"),
    "other numbers": lambda saved: saved["optimizer"]["param_groups"][1]["params"].reverse(),
    "other groups": lambda saved: saved["optimizer"]["param_groups"].pop(),
}


@pytest.mark.parametrize("change", ABSURD.values(), ids=ABSURD)
def test_what_is_not_the_state_of_a_run_is_refused_with_a_reason(
    change: Callable[[dict], object], tiny_run
):
    path = step_files(tiny_run)[-1]
    content = load(path, check_content)
    change(content)
    torch.save(content, path)
    with pytest.raises(
        ValueError, match=r"cannot read the checkpoint .*step_00000004\.pt: \w"
    ) as e:
        load(path, check_content)
    assert "\n" not in str(e.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_nobody_waits_for_a_pipe_with_the_name_of_a_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "step_00000009.pt")
    with pytest.raises(ValueError, match="it is not a file"):
        load(tmp_path / "step_00000009.pt")


def test_only_what_a_killed_run_has_left_is_removed(tmp_path):
    """The folder may hold other files of its user, also temporary ones."""
    for name in (
        ".step_00000004.pt.tmp",
        ".best.pt.tmp",
        ".run.json.tmp",
        ".mine.tmp",
        "a.pt.tmp",
    ):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".mine.tmp", "a.pt.tmp"}


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", '{"launch": "other"}'])
def test_only_its_own_launch_counts_as_that_of_a_run(text, tmp_path):
    assert launch_of(tmp_path) is None
    Path(tmp_path, "run.json").write_text(text, encoding="latin-1")
    assert launch_of(tmp_path) == ("other" if "other" in text else None)
