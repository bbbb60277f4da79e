"""What all tests share: a place to work in, the scripts in this process, and one tiny run."""

import contextlib
import io
import os
import runpy
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch

from nanolm.system.signals import handled_by

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, it would be ignored in all tests

ROOT = Path(__file__).resolve().parent.parent
TEXT = "".join(f"{i} little wolves met {i * i} foxes,\nand {i % 7} ran.\n" for i in range(40))
# A model that trains in no time, on the CPU.
TINY = [
    "--dataset=tiny",
    "--n_layer=1",
    "--n_head=2",
    "--n_embd=8",
    "--block_size=8",
    "--batch_size=2",
    "--gradient_accumulation_steps=1",
    "--max_iters=4",
    "--eval_interval=2",
    "--eval_iters=1",
    "--sample_tokens=5",
    "--warmup_iters=1",
    "--device=cpu",
    "--dtype=float32",
    "--compile=false",
]

# The flags for each other task.
TASKS = {
    "masked": ["--task=masked", "--dataset=words"],
    "classification": ["--task=classification", "--dataset=kinds", "--causal=false"],
    "tagging": ["--task=tagging", "--dataset=tags"],
    "completion": ["--task=completion", "--dataset=pairs", "--eval_answers=2"],
    "seq2seq": ["--task=seq2seq", "--dataset=pairs", "--eval_answers=2", "--n_encoder_layer=1"],
}

# More threads only wait for each other on models this small, here and in child processes.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
hypothesis.settings.register_profile(
    "nanolm",
    deadline=None,  # a slow machine is no error
    suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture,
        hypothesis.HealthCheck.too_slow,
    ],
)
hypothesis.settings.load_profile("nanolm")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def run_here(script: str, *arguments: object) -> int:
    """Run train, sample or prepare in this process and folder; returns its exit code."""
    answer = signal.getsignal(signal.SIGINT)  # which a script sets, and this process keeps
    with pytest.MonkeyPatch.context() as patch, handled_by(answer, [signal.SIGINT]):
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    return end.value.code


@pytest.fixture(autouse=True)
def compiled_afresh():
    """What one test has compiled is not held against the next: PyTorch limits recompilations."""
    yield
    if "torch._dynamo" in sys.modules:  # otherwise nothing was compiled, and loading it takes time
        torch.compiler.reset()


@pytest.fixture
def run_main(capsys) -> Callable[..., tuple[int, str, str]]:
    """run_main("train", *arguments) -> exit code, stdout, stderr."""

    def run(script: str, *arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run_here(script, *arguments)
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def test_data() -> Path:
    """A folder of real data; tests that need it are skipped where NANOLM_TEST_DATA names none."""
    if not os.environ.get("NANOLM_TEST_DATA"):
        pytest.skip("NANOLM_TEST_DATA is not set")
    return Path(os.environ["NANOLM_TEST_DATA"]).resolve()


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """The current folder, an empty one: data/ and out/ are made here."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def tiny_text() -> str:
    """A text of about a thousand characters."""
    return TEXT


PREPARED = {
    "words": ["--input", "text.txt", "--tokenizer=bpe:280"],
    "kinds": ["--task=classification", "--input", "kinds.csv", "--tokenizer=bpe:270"],
    "tags": ["--task=tagging", "--input", "tags.conll", "--tokenizer=bpe:270"],
    "pairs": ["--task=completion", "--input", "pairs.tsv", "--tokenizer=bpe:270"],
}


def write_texts_of_tasks() -> None:
    """kinds.csv, texts of two kinds; tags.conll, sentences with names; pairs.tsv, sums."""
    animals = ("wolf", "fox", "owl")
    rows = [f"{i % 7} and {i} {animals[i % 3]}s,{'few' if i < 30 else 'many'}" for i in range(60)]
    Path("kinds.csv").write_text("\n".join(["text,label", *rows, ""]))
    words = (
        f"the O\n{animals[i % 3]} O\nMary B-PER\n{'Fox I-PER' * (i % 2)}\n" for i in range(60)
    )
    Path("tags.conll").write_text("\n".join(words))
    sums = (f"{i % 5}+{i // 5}\t{i % 5 + i // 5}" for i in range(40))
    Path("pairs.tsv").write_text("\n".join(sums))


@pytest.fixture(scope="session")
def trained_place(tmp_path_factory, tiny_text) -> Path:
    """A folder with text.txt, data/tiny, those of PREPARED, and out/tiny, a run of four updates.

    Not to be changed.
    """
    place = tmp_path_factory.mktemp("trained")
    (place / "text.txt").write_text(tiny_text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.chdir(place)
        assert run_here("prepare", "tiny", "--input", "text.txt") == 0, said.getvalue()
        assert run_here("train", *TINY, "--out_dir=out/tiny") == 0, said.getvalue()
        write_texts_of_tasks()
        for name, keys in PREPARED.items():
            assert run_here("prepare", name, *keys) == 0, said.getvalue()
    return place


@pytest.fixture
def tiny_run(trained_place, workplace) -> Path:
    """out/tiny below the current folder: a copy of the tiny run, with text.txt and data/tiny."""
    shutil.copytree(trained_place, workplace, dirs_exist_ok=True)
    return Path("out", "tiny")
