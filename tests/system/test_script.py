"""Laws of scripts: how they end."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TINY


@pytest.mark.parametrize("script", ["train.py", "sample.py", "prepare.py"])
def test_ctrl_c_during_the_imports_ends_them_without_a_traceback(script, tmp_path):
    """torch takes seconds to import: here it is one that never ends."""
    (tmp_path / "torch.py").write_text("import time; open('here', 'w').close(); time.sleep(60)")
    for name in ("numpy.py", "tiktoken.py"):  # whichever comes first
        (tmp_path / name).write_text("import torch")
    process = subprocess.Popen(
        [sys.executable, ROOT / script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "here").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert (process.returncode, said) == (-signal.SIGINT, "")  # which a shell calls 130


@pytest.mark.parametrize("chapter", ["bpe", "training", "runs.start"])
def test_a_chapter_that_is_run_says_what_to_run(chapter):
    """It once did nothing, and exited with 0."""
    words = [sys.executable, "-m", f"nanolm.{chapter}"]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert "train.py" in run.stderr


@pytest.mark.parametrize("also", [{}, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}])
def test_variables_that_a_launcher_has_left_silence_nothing(also, tiny_run, run_main, monkeypatch):
    """RANK=1 and WORLD_SIZE=2 once threw away what was sampled, and left refusals unsaid."""
    flags = ("--num_samples=1", "--max_new_tokens=3", "--temperature=0", "--device=cpu")
    code, text, _ = run_main("sample", *flags)
    assert (code, bool(text)) == (0, True)
    for key, value in {"RANK": "1", "WORLD_SIZE": "2", **also}.items():
        monkeypatch.setenv(key, value)
    assert run_main("sample", *flags)[:2] == (0, text)
    code, out, _ = run_main("prepare", "tiny", "--input", "text.txt")
    assert (code, "there already" in out) == (0, True)
    for script, *words in (["prepare", "new"], ["train", *TINY], ["train", "--n_layers=2"]):
        code, _, err = run_main(script, *words)
        assert (code, err[:7], err.count("\n")) == (2, "error: ", 1)


def test_of_processes_that_torchrun_starts_one_speaks(run_main, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for rank, said in ("0", 1), ("1", 0):
        for key, value in {"RANK": rank, "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}.items():
            monkeypatch.setenv(key, value)
        code, _, err = run_main("train", "--n_layers=2")
        assert (code, err.count("\n")) == (2, said)


def test_stray_variables_are_named_where_nobody_can_be_met(tiny_run, run_main, monkeypatch):
    for key, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    code, _, err = run_main("train", *TINY, "--gradient_accumulation_steps=2")
    assert (code, "unset RANK and WORLD_SIZE" in err, err.count("\n")) == (2, True, 1)
