"""What was written once and must hold for ever: a loss curve, and a run with its checkpoint.

tests/golden/ is never written again, but for a curve whose change is meant. Every key of its
configs stands in it, so that a new default does not change what is compared; a new key must have a
value that leaves the old behaviour as it was, and is added here with it.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from nanolm.runs.checkpoint import load
from nanolm.runs.load import check_fits, load_trained
from nanolm.runs.log import read_metrics
from nanolm.runs.prepare import prepare
from nanolm.runs.settings import TrainConfig
from nanolm.runs.start import start_run

GOLDEN = ROOT / "tests" / "golden"
CURVE = json.loads((GOLDEN / "curve.json").read_text(encoding="utf-8"))
RUN = json.loads((GOLDEN / "run.json").read_text(encoding="utf-8"))


@pytest.fixture
def golden_text(workplace, monkeypatch) -> Path:
    """The current folder, with data/golden."""
    monkeypatch.setattr("nanolm.runs.pictures.draw_losses", lambda *_, **__: False)
    prepare("golden", inputs=(str(GOLDEN / "text.txt"),))
    return workplace


def losses(folder: Path) -> list[float]:
    """The loss of each update in a run's metrics."""
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


def test_every_key_of_the_curve_is_pinned():
    assert CURVE["config"].keys() == asdict(TrainConfig()).keys()


def test_training_follows_the_curve(golden_text):
    """A hundred updates, with dropout, accumulation and all that the modern block has."""
    start_run(TrainConfig(**CURVE["config"]))
    found = losses(Path(CURVE["config"]["out_dir"]))
    assert len(found) == len(CURVE["losses"]) == 100
    assert max(abs(a - b) for a, b in zip(found, CURVE["losses"], strict=True)) <= 1e-3
    assert CURVE["losses"][-1] < CURVE["losses"][0] - 0.5  # it is a curve


def test_a_checkpoint_of_long_ago_still_predicts_what_it_did():
    assert (GOLDEN / "run" / "step_00000030.pt").stat().st_size < 100_000
    model, tokenizer, content = load_trained(GOLDEN / "run")
    assert content["step"] == 30
    ids = torch.tensor([tokenizer.encode(RUN["prompt"])])
    with torch.no_grad():
        logits, _ = model(ids)
    assert (logits[0, -1] - torch.tensor(RUN["logits"])).abs().max() <= 1e-4


def test_a_checkpoint_of_long_ago_can_still_be_resumed(golden_text):
    """Its config may lack keys that are younger than it, and have others."""
    folder = Path(shutil.copytree(GOLDEN / "run", "out/golden"))
    saved = load(folder / "step_00000030.pt", check_fits)
    keys = {key: saved["config"][key] for key in RUN["keys"]}
    start_run(TrainConfig(**keys, init_from="resume", out_dir=str(folder)))
    assert max(abs(a - b) for a, b in zip(losses(folder), RUN["losses"], strict=True)) <= 1e-3
