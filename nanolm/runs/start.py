"""The start of a run: from a configuration to objects that are ready.

The order matters. All that can be wrong is found before anything is written, and every process of
the run has found its own part right before one of them goes on.
"""

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nanolm.hub.families import tied
from nanolm.hub.names import is_hub_name
from nanolm.layers import ModelConfig
from nanolm.model import Transformer, flops_per_token
from nanolm.optim import OPTIMIZERS, parameter_groups, part_of, whole
from nanolm.parallel import ALONE, World, without_weights
from nanolm.precision import Engine, Hardware, choose_engine, find_hardware
from nanolm.runs import checkpoint
from nanolm.runs.console import describe, describe_end
from nanolm.runs.folder import (
    check_replaceable,
    holds_a_run,
    recorded,
    remove_leftovers,
    resuming,
    taken,
)
from nanolm.runs.load import check_fits, load_model
from nanolm.runs.log import evaluation_line
from nanolm.runs.prepare import find_dataset
from nanolm.runs.processes import all_or_none, broadcast, find_world, joined, own_gpu
from nanolm.runs.run import Run
from nanolm.runs.settings import DERIVED_KEYS, HEAD_KEYS, SHAPE_KEYS, TrainConfig, model_config_of
from nanolm.system.config import quoted
from nanolm.system.script import Console
from nanolm.tasks.table import TASKS, make_task
from nanolm.text.data import Dataset, datasets
from nanolm.text.known import KNOWN_DATASETS
from nanolm.text.tokenizer import (
    TOKENIZER_FILE,
    Tokenizer,
    extends,
    load_tokenizer,
)
from nanolm.training import TrainState, grad_scaler, recompute_blocks, warm_up_ddp


@dataclass
class Start:
    """Where a run starts from: nothing, another model's weights, or a checkpoint of its own."""

    source: str | None = None  # the other model
    resumes: bool = False
    checkpoint: dict | None = None  # of another model: its weights and its config, no more
    tokenizer: Tokenizer | None = None  # of what the weights or the checkpoint come from

    def __getstate__(self) -> dict:
        """What the other processes get: of the tensors only the shapes (see World.broadcast)."""
        return {**vars(self), "checkpoint": shapes_of(self.checkpoint)}

    def words(self, step: int) -> str:
        """Where the run starts from, for the console."""
        if self.resumes:
            return f"resumed at step {step}"
        return f"from the weights of {self.source}" if self.source else "from step 0"


def shapes_of(content: Any) -> Any:
    """A content with tensors that have no values."""
    if isinstance(content, dict):
        return {key: shapes_of(part) for key, part in content.items()}
    return content.to("meta") if isinstance(content, torch.Tensor) else content


def start_run(config: TrainConfig) -> None:
    """Train as the config says, from getting the data to drawing the loss.

    Raises ValueError or FileNotFoundError, with nothing changed, for what cannot be run; Stopped
    where a signal asks to leave.
    """
    check_layout(config, lay_out(config, find_world()))
    with joined(config.backend) as world, ExitStack() as stack:
        if sys.stdout:
            console = Console(sys.stdout, f"the run in {config.out_dir} goes on without")
            stack.enter_context(redirect_stdout(console))
        world = lay_out(config, world)
        config, dataset = open_data(config, world)
        folder = broadcast(world, lambda: stack.enter_context(taken(config.out_dir)))
        start = broadcast(world, lambda: find_start(config, folder, dataset, world))
        run = make_ready(config, dataset, world, start)
        start.checkpoint = None  # as large as all that it was copied into
        if config.eval_only:
            describe(run, start.words(run.state.step))
            print(evaluation_line(run.state.step, run.scores()))
        elif run.is_finished():
            print(f"{folder} is finished: {run.state.step} of {run.config.max_iters} updates made")
            print("          to go on, raise --max_iters")
        else:
            train_from(start, run)


def train_from(start: Start, run: Run) -> None:
    """Write down what the run is, describe it, train it to its end, and say what came out."""
    state, world, began = run.state, run.world, time.perf_counter()
    with world.sharing_gradients(state.forward) as state.forward:  # DDP, of several processes
        if world.replicates:
            warm_up_ddp(state, next(run.micro_batches(0)), run.engine)
        broadcast(world, lambda: run.record(fresh=not start.resumes))
        describe(run, start.words(state.step))
        run.train()
        describe_end(run, time.perf_counter() - began)


# ------------------------------------------------------------------------------------------
# The data, and what several processes must agree on


def open_data(config: TrainConfig, world: World) -> tuple[TrainConfig, Dataset]:
    """Open the dataset (process 0 prepares it, if need be), and note its vocabulary in the config.

    Raises ValueError or FileNotFoundError where there is none, or none that fits.
    """
    config = broadcast(world, lambda: config)  # that of process 0 counts for all
    broadcast(world, lambda: check_dataset_named(config))
    broadcast(world, lambda: find_dataset(config.dataset).meta)  # the others wait for its files
    with all_or_none(world):
        config, dataset = fit_to_task(config, find_dataset(config.dataset))
        text = dataset.meta["train"]["sha256"]
    first = broadcast(world, lambda: text)
    with all_or_none(world):
        if text != first:
            raise ValueError(
                f"{dataset.folder} of this machine holds other tokens than that of process 0: "
                "copy the folder from there"
            )
    return config, dataset


def check_dataset_named(config: TrainConfig) -> None:
    """Raise ValueError where no dataset is named, and there is none by the usual name."""
    known = [*dict.fromkeys((*datasets(), *KNOWN_DATASETS))]
    if config.dataset == TrainConfig.dataset and config.dataset not in known:
        raise ValueError(
            f"the key dataset is missing, or {config.dataset!r}, which is not prepared: choose "
            f"one with --dataset=NAME, of {', '.join(known)}"
        )


def fit_to_task(config: TrainConfig, dataset: Dataset) -> tuple[TrainConfig, Dataset]:
    """The config with the keys that follow from task and dataset, which the task may complete."""
    task = TASKS[config.task]
    if dataset.meta["task"] != task.reads:
        raise ValueError(
            f"task={config.task!r} and {dataset.folder}, which is prepared for "
            f"{dataset.meta['task']!r}: choose another --dataset, or another --task"
        )
    dataset, keys = task.fit(dataset)
    for key, value in keys.items():
        if getattr(config, key) not in (getattr(TrainConfig, key), value) and key != "begin_id":
            raise ValueError(
                f"{key}={getattr(config, key)}: task={config.task!r} with {dataset.folder} asks "
                f"for {value!r}; choose the dataset of this model, or leave this key out"
            )
    config = replace(config, **keys)
    check_kind(config, config.kind, "the config says")
    return config, dataset


def check_kind(config: TrainConfig, kind: str, whose: str) -> None:
    """Raise ValueError where the task does not train such a model. whose: where it comes from."""
    allowed = TASKS[config.task].kinds
    if kind not in allowed:
        keys = "causal=True or False, and n_encoder_layer, say which"
        raise ValueError(
            f"{whose} {kind}, and task={config.task!r} trains {' or '.join(allowed)}: "
            f"{keys if whose.startswith('the config') else 'begin with another model'}"
        )


def lay_out(config: TrainConfig, world: World) -> World:
    """The processes, holding the model as the config says."""
    return replace(world, shard=config.shard, tensor=config.tensor_parallel)


def check_layout(config: TrainConfig, world: World) -> None:
    """Raise ValueError where the processes cannot share the model, or the batches, so."""
    tensor, size, replicas = world.tensor, world.size, world.replicas
    asked = f"tensor_parallel={tensor}"
    if size % tensor:
        raise ValueError(
            f"{asked}: {size} process{'es' * (size > 1)} cannot form groups of {tensor}; start "
            f"a multiple of {tensor}, as torchrun --nproc_per_node={-(-size // tensor) * tensor}, "
            "or add --tensor_parallel=1"
        )
    if tensor > 1 and replicas > 1 and not world.shard:
        raise ValueError(
            f"{asked} on {size} processes: add --shard=true, by which the {replicas} groups share "
            f"the weights, or start {tensor} processes"
        )
    n = config.gradient_accumulation_steps
    if n % replicas:
        what = f"{replicas} {'groups' if tensor > 1 else 'processes'}"
        raise ValueError(
            f"gradient_accumulation_steps={n}: {what} share the micro-batches of an "
            f"update, so it must be a multiple of {replicas}, as {-(-n // replicas) * replicas}"
        )


def check_split(shape: ModelConfig, engine: Engine, world: World) -> None:
    """Raise ValueError where a model of that shape cannot be cut, or not trained in parts."""
    n = world.tensor
    for key in ("n_head", "n_kv_head", "n_hidden"):
        if getattr(shape, key) % n:
            raise ValueError(f"tensor_parallel={n}: must divide {key}={getattr(shape, key)}")
    if (n - 1) * -(-shape.vocab_size // n) >= shape.vocab_size:
        raise ValueError(f"tensor_parallel={n}: too many for vocab_size={shape.vocab_size}")
    if world.splits and engine.dtype == "float16":
        raise ValueError(
            "dtype='float16': a model in parts is trained in bfloat16 or float32; choose one"
        )
    if world.splits and engine.compile:
        raise ValueError("compile=True: a model in parts is not compiled; use --compile=auto")


# ------------------------------------------------------------------------------------------
# Where the run starts from


def find_start(config: TrainConfig, folder: Path, dataset: Dataset, world: World) -> Start:
    """What init_from asks for; a run that torchrun has restarted resumes, however it began.

    Raises ValueError or FileNotFoundError where that cannot be, or where the model has learned
    other tokens than the dataset's.
    """
    asked, there = config.init_from, holds_a_run(folder)
    restarted = world.restarts > 0 and recorded(folder).get("launch") == world.launch
    if asked == "resume" or (there and (restarted or asked == "auto")):
        start = start_from_checkpoint(folder, dataset)
    else:
        source = {"scratch": None, "auto": config.pretrained}.get(asked, asked)
        check_replaceable(config, folder, source)
        start = Start() if source is None else start_from_weights(source, dataset)
    remove_leftovers(folder)
    return start


def start_from_checkpoint(folder: Path, dataset: Dataset) -> Start:
    """Resume from the folder's newest checkpoint that is sound."""
    content, problems = checkpoint.load_newest(folder, check_fits)
    for problem in problems:
        print(f"warning   {problem}; using another one")
    if not (folder / TOKENIZER_FILE).exists():
        raise ValueError(
            f"{folder} has lost its {TOKENIZER_FILE}: copy it there from {dataset.folder}, if "
            "that is the dataset it was trained on"
        )
    tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
    check_tokenizer(tokenizer, dataset, folder)
    if content["text"] != dataset.meta["train"]["sha256"]:
        print(f"changed   the text in {dataset.folder}: another one before")
    return Start(resumes=True, checkpoint=content, tokenizer=tokenizer)


def start_from_weights(source: str, dataset: Dataset) -> Start:
    """Begin with the weights of a trained model: a run's, a folder's, or one of the hub.

    It may know a mask that the dataset does not, and the dataset tokens of conversations.
    """
    if not (source and Path(source).is_dir()) and not is_hub_name(source):
        raise ValueError(
            f"init_from={source!r}: choose scratch, resume, auto, the folder of a model, gpt2, "
            "bert-base-uncased, or OWNER/NAME on the Hugging Face hub"
        )
    model, tokenizer, _, _ = load_model(source)
    check_tokenizer(tokenizer, dataset, source)
    content = {"model": model.state_dict(), "config": asdict(model.config)}
    return Start(source, checkpoint=content, tokenizer=tokenizer)


def check_tokenizer(tokenizer: Tokenizer, dataset: Dataset, name: str | Path) -> None:
    """Raise ValueError where the model was trained on other ids than the dataset's."""
    if not (extends(tokenizer, dataset.tokenizer) or extends(dataset.tokenizer, tokenizer)):
        raise ValueError(
            f"{name} was trained with another tokenizer than that of {dataset.folder}: choose the "
            "--dataset it knows, or prepare the text for it: python prepare.py NAME "
            f"--tokenizer={quoted(name)}"
        )


# ------------------------------------------------------------------------------------------
# The objects


def make_ready(config: TrainConfig, dataset: Dataset, world: World, start: Start) -> Run:
    """The run with all its objects, standing where it starts from."""
    hardware = broadcast(world, find_hardware)  # one choice for all, also on unlike machines
    with all_or_none(world):
        config = fit_to_start(config, start)
        known = [dataset.tokenizer, *([start.tokenizer] if start.tokenizer else [])]
        largest = max(reversed(known), key=lambda tokenizer: tokenizer.vocab_size)
        dataset = replace(dataset, tokenizer=largest)
        task = make_task(config, largest)
        model = fresh_model(config, task.model, world)
        engine = own_gpu(world, run_engine(config, model, hardware, start, world))
        check_split(model.config, engine, world)
    with all_or_none(world):
        state = build_state(config, model, engine, world)
        if start.resumes:
            state.load_state_dict(start.checkpoint, world)
        elif start.checkpoint:
            load_weights(state.model, **start.checkpoint, world=world)
        run = Run(config, Path(config.out_dir), dataset, task, engine, state, world)
        next(run.micro_batches(state.step))  # wrong data shows before anything is written
    return run


def fit_to_start(config: TrainConfig, start: Start) -> TrainConfig:
    """The config of a run that starts from what is there.

    One that starts from weights takes over their shape. A resumed one keeps its model and its
    optimizer: raises ValueError where they differ, and prints what else does.
    """
    if not start.checkpoint:
        return config
    old = start.checkpoint["config"]
    if not start.resumes:
        config = replace(config, init_from=start.source, pretrained=None)
        return take_shape(config, old, start.source)
    origin = old["init_from"]
    if origin not in ("scratch", "auto", "resume"):
        config = take_shape(config, old, config.out_dir)
    new = asdict(config)
    changed = {key for key in new if key in old and old[key] != new[key]}
    wrong = [
        f"{key} is {old[key]!r} there and {new[key]!r} here"
        for key in (*SHAPE_KEYS, "optimizer", "task", "best_by")
        if key in changed and not (key in DERIVED_KEYS and "n_embd" in changed)
    ]
    if wrong:
        raise ValueError(
            f"this config does not match the checkpoint in {config.out_dir}: {'; '.join(wrong)}; "
            f"continue it as it is with {resuming(config.out_dir)}, or choose another --out_dir"
        )
    for key in sorted(changed - {"init_from", "pretrained", "overwrite", "eval_only", "out_dir"}):
        print(f"changed   {key}: {old[key]!r} before, {new[key]!r} now")
    if changed & {"dataset", "eval_iters", "batch_size", "mask_fraction", "batch_tokens", "pack"}:
        print("warning   losses of other batches: those before and after do not compare")
    # init_from stays, for it says where the shape came from
    return replace(config, init_from=origin, pretrained=None)


def take_shape(config: TrainConfig, old: dict, source: str) -> TrainConfig:
    """The config with the shape of the model whose weights it starts from.

    Only its context may be shorter, its vocabulary larger, and its head another.
    """
    before = model_config_of(old)
    shape = asdict(before)
    check_kind(config, before.kind, f"{source} is")
    keys = set(SHAPE_KEYS).difference(HEAD_KEYS)
    taken = {
        key: shape[key] for key in shape if key in keys and shape[key] != getattr(config, key)
    }
    if config.block_size < shape["block_size"]:
        del taken["block_size"]
        print(f"block     cut to {config.block_size} tokens, of {shape['block_size']}")
    if config.vocab_size > shape["vocab_size"]:
        del taken["vocab_size"]
    if taken:
        print(f"shape     of {source}: {', '.join(f'{k}={v!r}' for k, v in taken.items())}")
    return replace(config, **taken)


@torch.no_grad()
def load_weights(
    into: Transformer, *, model: dict[str, torch.Tensor], config: dict, world: World = ALONE
) -> None:
    """Load another model's weights: no more positions than fit, and no head of another kind.

    model, config: its weights (those of process 0 count) and the keys of its shape. Tokens that it
    does not know keep their fresh embeddings.
    """
    own, shape = into.state_dict(), into.config
    if n := shape.vocab_size - config["vocab_size"]:
        print(f"tokens    {n} fresh embeddings: the model did not know them")
    kept = ()
    if any(config[key] != getattr(shape, key) for key in HEAD_KEYS):
        print(f"head      fresh: {len(shape.labels) or 'tokens and no'} labels")
        kept = ("head.", "transform.")
    for name in own:
        if name not in tied(shape) and not name.startswith(kept):
            rows = world.broadcast(model[name])[: len(own[name])]
            fresh = whole(own[name])[len(rows) :].cpu()
            own[name].copy_(part_of(torch.cat((rows, fresh)), own[name]))


def run_engine(
    config: TrainConfig, model: Transformer, hardware: Hardware, start: Start, world: World
) -> Engine:
    """The engine that config and hardware give; auto keeps what it chose for the run before."""
    asked = {key: getattr(config, key) for key in ("device", "dtype", "compile")}
    if start.resumes:
        before = start.checkpoint["engine"]
        before = {**before, "device": before["device"].split(":")[0]}  # on whichever GPU is free
        kept = {key: before[key] if value == "auto" else value for key, value in asked.items()}
        with suppress(ValueError):  # the run has moved to a machine without that device
            return replace(choose_engine(hardware, **kept), reasons=("as the run began",) * 3)
    updates = 0 if config.eval_only else config.max_iters
    flops = flops_per_token(model) * config.tokens_per_update * updates
    many_shapes = config.n_encoder_layer > 0  # sources and answers differ in length
    return choose_engine(hardware, **asked, flops=flops, many_shapes=many_shapes)


def fresh_model(
    config: TrainConfig, build: Callable[[ModelConfig], Transformer], world: World
) -> Transformer:
    """The model that build makes, freshly drawn; without weights yet, where processes split it."""
    torch.manual_seed(config.seed)
    with without_weights() if world.splits else nullcontext():
        return build(config.model_config())


def build_state(
    config: TrainConfig, model: Transformer, engine: Engine, world: World = ALONE
) -> TrainState:
    """The model on its device, or this process's part of it, with its optimizer."""
    if engine.device_type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    if config.recompute:
        recompute_blocks(model)
    if world.splits:
        from nanolm.parts import split_model  # takes time, and is seldom needed

        split_model(model, world, engine)
    else:
        model = model.to(engine.device)
    groups = parameter_groups(model, config.weight_decay, config.optimizer)
    betas = (config.beta1, config.beta2)
    optimizer = OPTIMIZERS[config.optimizer](groups, lr=config.learning_rate, betas=betas)
    # On a CPU, the compiler's random numbers for dropout take longer than PyTorch's own.
    options = {"fallback_random": engine.device_type == "cpu"}
    forward = torch.compile(model, options=options) if engine.compile else model
    return TrainState(model, optimizer, forward, grad_scaler(engine))
