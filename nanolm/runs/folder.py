"""The folder of a run: where it starts from, what protects it, and the model that comes out of it.

It contains run.json (the configuration and the engine), nanolm_tokenizer.json, metrics.jsonl,
loss.png, step_XXXXXXXX.pt and best.pt. A run can be stopped and resumed; another one cannot start
over it by mistake, and two cannot write to it at once.
"""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch

from nanolm.hub.models import CONFIG
from nanolm.layers import ModelConfig
from nanolm.model import GPT, build_model
from nanolm.optim import memory_names, parameter_groups
from nanolm.runs import checkpoint
from nanolm.runs.settings import MODEL_KEYS, SHAPE_KEYS, TrainConfig
from nanolm.system.files import lock, made_folder, remove_temporaries, write_text
from nanolm.text.data import SEAL, Dataset
from nanolm.text.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer

RUNS = Path("out")
RUN_FILE, METRICS_FILE, PICTURE = "run.json", "metrics.jsonl", "loss.png"


@contextmanager
def run_folder(path: str) -> Iterator[Path]:
    """Make a run's folder and lock it; where nothing is put in it, it does not stay.

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
    names = (RUN_FILE, METRICS_FILE, PICTURE, TOKENIZER_FILE, checkpoint.BEST, "step_*.pt")
    remove_temporaries(folder, *names)


def launch_of(folder: Path) -> str | None:
    """The launch (see World) that has begun the run in the folder, or resumed it last."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        return json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))["launch"]


def holds_a_run(folder: Path) -> bool:
    """Whether there is a checkpoint in the folder, sound or not."""
    return bool(checkpoint.step_files(folder)) or (folder / checkpoint.BEST).exists()


def check_replaceable(config: TrainConfig, folder: Path, way: str) -> None:
    """Raise ValueError where the run in the folder must not, or cannot, give way to a new one."""
    harmless = config.overwrite or (config.eval_only and way != "scratch")
    if holds_a_run(folder) and not harmless:
        raise ValueError(
            f"{folder} holds a run already: continue it with --init_from=resume, choose another "
            "--out_dir, or replace it with --overwrite=true"
        )
    if Path(way).is_dir() and folder.samefile(way) and not config.eval_only:
        raise ValueError(
            f"init_from={way!r} is also the out_dir: continue the run with --init_from=resume, or "
            "choose another --out_dir"
        )
    for path in checkpoint.step_files(folder):
        if path.is_dir():
            raise ValueError(f"{path} is a folder: remove it first")


def saved_model_config(saved: dict) -> ModelConfig:
    """The model of a checkpoint; keys that are younger than it have their defaults."""
    return ModelConfig(
        **{key: saved["config"][key] for key in MODEL_KEYS if key in saved["config"]}
    )


def check_content(saved: dict) -> None:
    """Raise an error that says what is wrong where a checkpoint is not that of a run.

    Its model and its optimizer must have the shapes that its config gives.
    """
    kinds = {"model": dict, "optimizer": dict, "scaler": dict, "text": str, "step": int}
    kinds |= {"evaluated": int, "skipped": int, "best_val_loss": (float, type(None))}
    for key, kind in kinds.items():
        if not isinstance(saved[key], kind):
            raise ValueError(f"its {key} is a {type(saved[key]).__name__}")
    if saved["step"] < 0 or not math.isfinite(saved["best_val_loss"] or 0):
        raise ValueError("its step or its best loss is no number that a run can have")
    engine = {"device": str, "dtype": str, "compile": bool}
    if not all(isinstance(saved["engine"][key], kind) for key, kind in engine.items()):
        raise ValueError(f"its engine is {saved['engine']}")
    if not checkpoint.is_finite(saved):
        raise ValueError("it holds numbers that are not finite")
    config = saved_model_config(saved)
    if config.n_layer > len(saved["model"]):
        raise ValueError(f"its config has {config.n_layer} layers, and its model fewer")
    with torch.device("meta"):  # shapes without memory
        model = build_model(config)
    wanted, found = (
        {k: like(v) for k, v in m.items()} for m in (model.state_dict(), saved["model"])
    )
    for name in wanted | found:
        if wanted.get(name) != found.get(name):
            raise ValueError(f"its {name} is {found.get(name)} and not {wanted.get(name)}")
    optimizer = saved["config"]["optimizer"]
    check_optimizer(saved["optimizer"], parameter_groups(model, 0.0, optimizer), optimizer)


def like(tensor: torch.Tensor) -> str:
    """What a tensor must have in common with another to take its place."""
    return f"{tuple(tensor.shape)} {tensor.dtype} {tensor.layout}"


def check_optimizer(saved: dict, groups: list[dict], optimizer: str) -> None:
    """Raise ValueError where an optimizer's saved state is not that for these parameters."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    names = [memory_names(optimizer, group) for group in groups for _ in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    sizes = [[len(group["params"]) for group in some] for some in (groups, saved["param_groups"])]
    memories = saved["state"]  # empty before the first update
    if sizes[0] != sizes[1] or numbers != list(range(len(parameters))):
        raise ValueError("its optimizer is that of another model")
    if memories and sorted(memories) != numbers:
        raise ValueError("its optimizer remembers some of its parameters, and not others")
    for number, memory in memories.items():
        if set(memory) != names[number]:
            raise ValueError(f"its optimizer remembers {', '.join(memory)} and is no {optimizer}")
        for name, value in memory.items():
            if name == "step":
                if not float(value) >= 1:
                    raise ValueError(f"its optimizer's step is {float(value)}")
            elif like(value) != like(parameters[number]):
                raise ValueError(f"its optimizer's {name} is {like(value)}")


def fit_to_checkpoint(config: TrainConfig, way: str, saved: dict) -> TrainConfig:
    """The config of a run that starts from a checkpoint.

    A run that starts from weights takes over their shape, but for a smaller block_size. A resumed
    run keeps its model, too: what it has not taken over from weights must not differ, nor may its
    optimizer; other changes are printed. Dropout may change either way.
    """
    old, new = {**saved["config"], **asdict(saved_model_config(saved))}, asdict(config)
    resumed, origin = way == "resume", old.get("init_from", "scratch")
    if not resumed or origin not in ("scratch", "auto", "resume"):
        taken = {key: old[key] for key in SHAPE_KEYS if old[key] != new[key]}
        if not resumed and new["block_size"] < old["block_size"]:
            del taken["block_size"]
            print(f"block     cut to {new['block_size']} tokens, of {old['block_size']}")
        if taken:
            source = config.out_dir if resumed else config.init_from
            print(f"shape     of {source}: {', '.join(f'{k}={v!r}' for k, v in taken.items())}")
            config = replace(config, **taken)
    if not resumed:
        return config
    new = asdict(config)
    changed = {key for key in new if key in old and old[key] != new[key]}
    wrong = [
        f"{key} is {old[key]!r} there and {new[key]!r} here"
        for key in (*SHAPE_KEYS, "optimizer")
        if key in changed
    ]
    if wrong:
        raise ValueError(
            f"this config does not match the checkpoint in {config.out_dir}: {'; '.join(wrong)}; "
            "give the keys as they were, or choose another --out_dir"
        )
    for key in sorted(changed - {"init_from", "overwrite", "eval_only", "out_dir"}):
        print(f"changed   {key}: {old[key]!r} before, {new[key]!r} now")
    return replace(config, init_from=origin)  # which says where the shape came from


def run_tokenizer(folder: Path, dataset: Dataset) -> Tokenizer:
    """The tokenizer that the run in the folder was trained with."""
    if not (folder / TOKENIZER_FILE).exists():
        raise ValueError(
            f"{folder} has lost its {TOKENIZER_FILE}: copy it there from {dataset.folder}, if "
            "that is the dataset it was trained on"
        )
    return load_tokenizer(folder / TOKENIZER_FILE)


def check_tokenizer(tokenizer: Tokenizer, dataset: Dataset, name: str | Path) -> None:
    """Raise ValueError where the model was trained on other ids than the dataset's."""
    if tokenizer != dataset.tokenizer:
        raise ValueError(
            f"{name} was trained with another tokenizer than that of {dataset.folder}: choose the "
            f"--dataset it knows, or prepare the text for it: prepare.py NAME --tokenizer={name}"
        )


def load_trained(folder: str | Path) -> tuple[GPT, Tokenizer, int]:
    """The best model of a run, its tokenizer, and how many updates it has had.

    Raises FileNotFoundError where the folder is no run, ValueError where its files are damaged.
    """
    folder = Path(folder)
    if not (folder / TOKENIZER_FILE).exists():
        raise FileNotFoundError(
            f"{folder} is not the folder of a run: train one with train.py; nor does it have the "
            "config.json of a pretrained model"
        )
    saved, problems = checkpoint.load_best(folder, check_content)
    for problem in problems:
        print(f"warning: {problem}; using another one", file=sys.stderr)
    model = build_model(saved_model_config(saved))
    model.load_state_dict(saved["model"])
    tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"{folder / TOKENIZER_FILE} has {tokenizer.vocab_size} tokens and the model beside it "
            f"{model.config.vocab_size}: put the run's own tokenizer back"
        )
    return model.eval(), tokenizer, saved["step"]


def newest_run() -> Path:
    """The folder in out/ that was trained last. Raises FileNotFoundError where there is none."""
    files = list(RUNS.glob("*/*.pt"))
    if not files:
        raise FileNotFoundError(
            f"no run in {RUNS}/: train one with train.py, or name its folder with --out_dir=PATH"
        )
    return max(files, key=lambda path: path.stat().st_mtime).parent
