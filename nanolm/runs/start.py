"""The start of a run: from a configuration to objects that are ready.

The order matters. All that can be wrong is found before anything is written, and every process of
the run has found its own part right before one of them goes on.
"""

from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch

from nanolm.hub.names import is_hub_name
from nanolm.model import GPT, build_model, flops_per_token
from nanolm.optim import OPTIMIZERS, parameter_groups
from nanolm.parallel import World
from nanolm.precision import Engine, Hardware, choose_engine, find_hardware
from nanolm.runs import checkpoint
from nanolm.runs.folder import (
    check_content,
    check_replaceable,
    check_tokenizer,
    fit_to_checkpoint,
    holds_a_run,
    launch_of,
    remove_leftovers,
    run_folder,
    run_tokenizer,
)
from nanolm.runs.load import load_model
from nanolm.runs.prepare import find_dataset
from nanolm.runs.processes import find_world, from_first, joined, one_by_one, own_gpu, united
from nanolm.runs.run import Run
from nanolm.runs.settings import TrainConfig
from nanolm.text.data import Dataset
from nanolm.training import TrainState, settle_gradients


def start_run(config: TrainConfig) -> None:
    """Train as the config says, from getting the data to drawing the loss.

    Raises ValueError or FileNotFoundError, with nothing changed, for what cannot be run; Stopped
    where a signal asks to leave.
    """
    check_shares(config, find_world())
    with joined(config.backend) as world, ExitStack() as stack:
        config, dataset = one_by_one(world, lambda: fit_to_dataset(config))
        with united(world):
            check_alike(config, dataset, world)
        way, saved = from_first(world, lambda: begin(config, dataset, world, stack))
        with united(world):
            check_one_folder(config, world)
        hardware = from_first(world, find_hardware)  # one choice for all, also on unlike machines
        with united(world):
            run = ready_run(config, dataset, world, hardware, way, saved)
        del saved  # as large as all that it was copied into
        if config.eval_only:
            run.describe()
            print(run.loss_line(run.evaluate()))
        elif run.is_finished():
            made = f"{run.state.step} of {config.max_iters} updates are made"
            print(f"{run.folder} is finished: {made}")
            print("          to go on, raise --max_iters")
        else:
            state = run.state
            with world.sharing_gradients(state.forward) as state.forward:
                if world.size > 1:
                    settle_gradients(state, next(run.micro_batches(0)), run.engine)
                from_first(world, run.record)
                run.describe()
                run.train()


def begin(
    config: TrainConfig, dataset: Dataset, world: World, stack: ExitStack
) -> tuple[str, dict | None]:
    """Take the run's folder, until the stack is closed; where the run starts (see find_start)."""
    folder = stack.enter_context(run_folder(config.out_dir))
    again = world.restarts > 0 and launch_of(folder) == world.launch
    way, saved = find_start(config, folder, dataset, restarted=again)
    remove_leftovers(folder)
    return way, saved


def find_start(
    config: TrainConfig, folder: Path, dataset: Dataset, *, restarted: bool = False
) -> tuple[str, dict | None]:
    """What init_from asks for: ("scratch", None), or ("resume" | "weights", a checkpoint).

    The checkpoint of "weights" holds no more than a model and its config. A run that torchrun has
    restarted resumes, however it began. Raises ValueError or FileNotFoundError where that cannot
    be, or where the model has learned other tokens than the dataset's.
    """
    way, there = config.init_from, holds_a_run(folder)
    if there and (restarted or way == "auto"):
        way = "resume"
    elif way == "auto":
        way = "scratch"
    if way == "resume":
        saved, problems = checkpoint.load_newest(folder, check_content)
        for problem in problems:
            print(f"warning   {problem}; using another one")
        check_tokenizer(run_tokenizer(folder, dataset), dataset, folder)
        return way, saved
    if way != "scratch" and not ((way and Path(way).is_dir()) or is_hub_name(way)):
        raise ValueError(
            f"init_from={way!r}: choose scratch, resume, auto, the folder of a model, gpt2, or "
            "OWNER/NAME on the Hugging Face hub"
        )
    check_replaceable(config, folder, way)
    if way == "scratch":
        return way, None
    model, tokenizer, _ = load_model(way)
    check_tokenizer(tokenizer, dataset, way)
    return "weights", {"model": model.state_dict(), "config": asdict(model.config)}


def ready_run(
    config: TrainConfig,
    dataset: Dataset,
    world: World,
    hardware: Hardware,
    way: str,
    saved: dict | None,
) -> Run:
    """The run with all its objects, standing where way (see find_start) and saved put it."""
    if saved:
        config = fit_to_checkpoint(config, way, saved)
    resumed = way == "resume"
    if resumed and saved["text"] != dataset.meta["train"]["sha256"]:
        print(f"changed   the text in {dataset.folder}: another one before")
    model = fresh_model(config)
    engine = run_engine(config, model, hardware, saved["engine"] if resumed else None)
    engine = own_gpu(world, engine)
    state = build_state(config, model, engine)
    if resumed:
        state.load_state_dict(saved)
    elif saved:
        state.model.load_state_dict(cut_positions(saved["model"], config.block_size))
    run = Run(config, Path(config.out_dir), dataset, engine, state, world, fresh=not resumed)
    next(run.micro_batches(state.step))  # wrong data shows before anything is written
    return run


# ------------------------------------------------------------------------------------------
# What several processes must agree on


def check_shares(config: TrainConfig, world: World) -> None:
    """Raise ValueError where the micro-batches of an update cannot be dealt out evenly."""
    n, size = config.gradient_accumulation_steps, world.size
    if n % size:
        raise ValueError(
            f"gradient_accumulation_steps={n}: {size} processes share the micro-batches of an "
            f"update, so it must be a multiple of {size}, as {-(-n // size) * size}"
        )


def check_alike(config: TrainConfig, dataset: Dataset, world: World) -> None:
    """Raise ValueError where this process would make another run than process 0."""
    mine = {**asdict(config), "text": dataset.meta["train"]["sha256"]}
    first = from_first(world, lambda: mine)
    other = [key for key in mine if mine[key] != first[key]]
    if other == ["text"]:
        raise ValueError(
            f"{dataset.folder} of this machine holds other tokens than that of process 0: copy "
            "the folder from there"
        )
    if other:
        raise ValueError(
            f"{other[0]} is {mine[other[0]]!r} here and {first[other[0]]!r} in process 0: start "
            "all processes with the same config"
        )


def check_one_folder(config: TrainConfig, world: World) -> None:
    """Raise ValueError where this machine has checkpoints of the run that process 0 has not."""
    mine = {path.name for path in checkpoint.step_files(config.out_dir)}
    more = mine - from_first(world, lambda: mine)
    if more:
        raise ValueError(
            f"{config.out_dir} of this machine holds {max(more)}, and that of process 0 does not: "
            "let the machines share the folder, or remove it here"
        )


# ------------------------------------------------------------------------------------------
# The objects


def fit_to_dataset(config: TrainConfig) -> tuple[TrainConfig, Dataset]:
    """Open the dataset, and fill its number of tokens into the config.

    Raises ValueError or FileNotFoundError where there is none, or none that fits.
    """
    dataset = find_dataset(config.dataset)
    n = dataset.tokenizer.vocab_size
    if config.vocab_size not in (None, n):
        raise ValueError(
            f"vocab_size={config.vocab_size}: the tokenizer of {dataset.folder} has {n} tokens; "
            "leave this key out"
        )
    return replace(config, vocab_size=n), dataset


def fresh_model(config: TrainConfig) -> GPT:
    """A model drawn from the seed."""
    torch.manual_seed(config.seed)
    return build_model(config.model_config())


def cut_positions(weights: dict[str, torch.Tensor], block_size: int) -> dict[str, torch.Tensor]:
    """The weights of a model with a context that is no longer than block_size."""
    return {
        name: weight[:block_size] if name == "positions.weight" else weight
        for name, weight in weights.items()
    }


def run_engine(config: TrainConfig, model: GPT, hardware: Hardware, before: dict | None) -> Engine:
    """The engine that config and hardware give; auto keeps what it chose for the run before."""
    asked = {key: getattr(config, key) for key in ("device", "dtype", "compile")}
    if before:
        before = {**before, "device": before["device"].split(":")[0]}  # on whichever GPU is free
        kept = {key: before[key] if value == "auto" else value for key, value in asked.items()}
        with suppress(ValueError):  # the run has moved to a machine without that device
            return replace(choose_engine(hardware, **kept), reasons=("as the run began",) * 3)
    updates = 0 if config.eval_only else config.max_iters
    flops = flops_per_token(model) * config.tokens_per_update * updates
    return choose_engine(hardware, **asked, flops=flops)


def build_state(config: TrainConfig, model: GPT, engine: Engine) -> TrainState:
    """The model on its device, with its optimizer, before the first update."""
    if engine.device_type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    model = model.to(engine.device)
    groups = parameter_groups(model, config.weight_decay, config.optimizer)
    betas = (config.beta1, config.beta2)
    optimizer = OPTIMIZERS[config.optimizer](groups, lr=config.learning_rate, betas=betas)
    scaler = torch.amp.GradScaler(engine.device_type, enabled=engine.dtype == "float16")
    return TrainState(model, torch.compile(model) if engine.compile else model, optimizer, scaler)
