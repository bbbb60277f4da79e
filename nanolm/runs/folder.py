"""The folder of a run: where it starts from, what protects it, and the model that comes out of it.

It contains run.json (the configuration and the engine), nanolm_tokenizer.json, metrics.jsonl,
loss.png, confusion.png where there are labels, step_XXXXXXXX.pt and best.pt. A run can be stopped
and resumed; another one cannot start over it by mistake, and two cannot write to it at once.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from nanolm.hub.models import CONFIG
from nanolm.runs import checkpoint
from nanolm.runs.settings import TrainConfig
from nanolm.system.config import quoted
from nanolm.system.files import json_of, lock, made_folder, remove_temporaries, write_text
from nanolm.text.data import SEAL
from nanolm.text.tokenizer import TOKENIZER_FILE

RUNS = Path("out")
RUN_FILE, METRICS_FILE = "run.json", "metrics.jsonl"
PICTURE, CONFUSION = "loss.png", "confusion.png"


@contextmanager
def taken(path: str) -> Iterator[Path]:
    """Make a run's folder and lock it for the block; if nothing is put in it, it does not stay.

    Raises ValueError where it cannot be written, or another process writes it.
    """
    if not path or any((Path(path) / name).exists() for name in (SEAL, CONFIG)):
        raise ValueError(
            f"out_dir={path!r}: choose a folder of its own, and not that of a dataset or of a "
            "pretrained model"
        )
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(made_folder(path))
            write_text(folder / ".nanolm_can_write", "")
            (folder / ".nanolm_can_write").unlink()
        except OSError as error:
            raise ValueError(
                f"out_dir={path!r} cannot be written ({error.strerror}); "
                "choose another with --out_dir=PATH"
            ) from None
        stack.enter_context(lock(folder))
        for name in (RUN_FILE, METRICS_FILE, TOKENIZER_FILE, checkpoint.BEST):
            if (folder / name).is_dir():
                raise ValueError(f"{folder / name} is a folder: remove it first")
        yield folder


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed run has left half-written in its folder."""
    names = (
        RUN_FILE,
        METRICS_FILE,
        PICTURE,
        CONFUSION,
        TOKENIZER_FILE,
        checkpoint.BEST,
        "step_*.pt",
    )
    remove_temporaries(folder, *names)


def recorded(folder: Path) -> dict:
    """What run.json says of the run in the folder; nothing where it cannot be read."""
    try:
        content = json_of(folder / RUN_FILE)
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def holds_a_run(folder: Path) -> bool:
    """Whether there is a checkpoint in the folder, sound or not."""
    return bool(checkpoint.step_files(folder)) or (folder / checkpoint.BEST).exists()


def resuming(folder: Path) -> str:
    """The command that continues the run in the folder."""
    return f"python train.py --out_dir={quoted(folder)} --init_from=resume"


def check_replaceable(config: TrainConfig, folder: Path, source: str | None) -> None:
    """Raise ValueError where the run in the folder must not, or cannot, give way to a new one.

    source: the model whose weights the new one begins with, if any.
    """
    harmless = config.overwrite or (config.eval_only and source is not None)
    if holds_a_run(folder) and not harmless:
        raise ValueError(
            f"{folder} already holds a run: choose another --out_dir, or continue the run with "
            f"{resuming(folder)}, or replace it with --overwrite=true"
        )
    if source and Path(source).is_dir() and folder.samefile(source) and not config.eval_only:
        raise ValueError(
            f"init_from={source!r} is also the out_dir: choose another, or continue the run with "
            f"{resuming(folder)}"
        )
    for path in checkpoint.step_files(folder):
        if path.is_dir():
            raise ValueError(f"{path} is a folder: remove it first")


def newest_run() -> Path:
    """The folder in out/ that was trained last. Raises FileNotFoundError where there is none."""
    files = list(RUNS.glob("*/*.pt"))
    if not files:
        raise FileNotFoundError(
            f"no run in {RUNS}/: train one with train.py, or name its folder with --out_dir=PATH"
        )
    return max(files, key=lambda path: path.stat().st_mtime).parent
