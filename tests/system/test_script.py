"""Laws of scripts: how they end."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT


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
