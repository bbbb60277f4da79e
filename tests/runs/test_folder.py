"""Laws of the folder of a run: what is taken for its checkpoint, and what is left alone."""

import os
from pathlib import Path

import pytest
import torch

from nanolm.model import build_model
from nanolm.runs.checkpoint import load, step_files
from nanolm.runs.folder import recorded, remove_leftovers
from nanolm.runs.load import check_fits
from nanolm.runs.settings import model_config_of

# Sound files with other contents, which somebody would have to make on purpose.
CHANGES = {
    "no weights": lambda content: content.update(model=[]),
    "a weight less": lambda content: content["model"].popitem(),
    "a weight more": lambda content: content["model"].update(more=torch.ones(2)),
    "wide": lambda content: content["config"].update(n_embd=16),
    "no width": lambda content: content["config"].update(n_embd=None),
    "no config": lambda content: content.pop("config"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_weights_that_are_not_those_of_their_config_are_refused_with_a_reason(change, tiny_run):
    path = step_files(tiny_run)[-1]
    content = load(path, check_fits)
    change(content)
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"read the checkpoint .*step_00000004\.pt: \w") as error:
        load(path, check_fits)
    assert "\n" not in str(error.value)


def test_checking_a_checkpoint_leaves_it_as_it_was(tiny_run):
    """Checking with assign=True once left a mark by which the next model took the weights over."""
    content = load(step_files(tiny_run)[-1], check_fits)
    model = build_model(model_config_of(content["config"]))
    model.load_state_dict(content["model"])
    assert model.head.weight is model.tokens.weight
    assert model.head.weight.data_ptr() != content["model"]["head.weight"].data_ptr()


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
def test_a_record_that_is_none_says_nothing(text, tmp_path):
    assert recorded(tmp_path) == {}
    Path(tmp_path, "run.json").write_text(text, encoding="latin-1")
    assert recorded(tmp_path) == ({"launch": "other"} if "other" in text else {})
