"""A run: from a configuration to objects that are ready, and what the loop asks of them."""

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path

import torch

from nanolm import checkpoint, metrics
from nanolm.batches import check_ids, evaluation_batches, training_batch, windows_per_epoch
from nanolm.data import Dataset, open_dataset
from nanolm.engine import Engine, choose_engine, find_hardware
from nanolm.evaluation import bits_per_byte, evaluate, perplexity
from nanolm.files import write_text
from nanolm.folder import (
    METRICS_FILE,
    PICTURE,
    RUN_FILE,
    check_tokenizer,
    find_start,
    fit_to_checkpoint,
    run_folder,
)
from nanolm.model import GPT, count_parameters
from nanolm.optim import OPTIMIZERS, parameter_groups
from nanolm.sampling import generate
from nanolm.settings import TrainConfig
from nanolm.tokenizer import TOKENIZER_FILE
from nanolm.training import Batch, TrainState, train

# What training reaches on a core of an ordinary CPU, in float32: for a first estimate of its time.
CPU_FLOPS_PER_THREAD = 2e10


def start_run(config: TrainConfig) -> None:
    """Train as the config says, from getting the data to drawing the loss.

    Raises ValueError or FileNotFoundError, with nothing changed, for what cannot be run.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(
            "nanolm trains in one process: start it as python train.py, without torchrun"
        )
    config, dataset = fit_to_dataset(config)
    with run_folder(config.out_dir) as folder:
        way, saved = find_start(config, folder)
        if saved:
            check_tokenizer(folder if way == "resume" else Path(config.init_from), dataset)
            config = fit_to_checkpoint(config, way, saved)
            if way == "resume" and saved["text"] != dataset.meta["train"]["sha256"]:
                print(f"changed   the text in {dataset.folder}: another one before")
        model = build_model(config)
        engine = run_engine(config, model, saved["engine"] if way == "resume" else None)
        state = build_state(config, model, engine)
        if way == "resume":
            state.load_state_dict(saved)
        elif way == "weights":
            state.model.load_state_dict(saved["model"])
        run = Run(config, folder, dataset, engine, state, fresh=way != "resume")
        if config.eval_only:
            run.describe()
            print(run.loss_line(run.evaluate()))
        elif state.step >= config.max_iters > 0:
            print(f"{folder} is finished: {state.step} of {config.max_iters} updates are made")
            print("          to go on, raise --max_iters")
        else:
            next(run.micro_batches(state.step))  # wrong data shows before anything is written
            if config.wandb_log:
                name = config.wandb_run_name or folder.name
                run.also = (metrics.wandb_log(config.wandb_project, name, asdict(config)),)
            run.record()
            run.describe()
            run.train()


# ------------------------------------------------------------------------------------------
# The objects


def fit_to_dataset(config: TrainConfig) -> tuple[TrainConfig, Dataset]:
    """Open the dataset, and fill its number of tokens into the config.

    Raises ValueError or FileNotFoundError where there is none, or none that fits.
    """
    dataset = open_dataset(config.dataset)
    windows_per_epoch(len(dataset.train), config.block_size)
    n = dataset.tokenizer.vocab_size
    if config.vocab_size not in (None, n):
        raise ValueError(
            f"vocab_size={config.vocab_size}: the tokenizer of {dataset.folder} has {n} tokens; "
            "leave this key out"
        )
    return replace(config, vocab_size=n), dataset


def build_model(config: TrainConfig) -> GPT:
    """A fresh model, drawn from the seed."""
    torch.manual_seed(config.seed)
    return GPT(config.model_config())


def flops_per_token(model: GPT) -> float:
    """Floating point operations of training the model on one token."""
    config, lookups = model.config, []
    if not config.tie_embeddings:
        lookups.append(model.tokens.weight)
    if config.position == "learned":
        lookups.append(model.positions.weight)
    n = count_parameters(model) - sum(weight.numel() for weight in lookups)
    shape = {key: getattr(config, key) for key in ("n_layer", "n_head", "head_size", "block_size")}
    return metrics.flops_per_token(n, **shape)


def run_engine(config: TrainConfig, model: GPT, before: dict | None) -> Engine:
    """The engine that config and machine give; auto keeps what it chose for the run before."""
    hardware = find_hardware()
    asked = {key: getattr(config, key) for key in ("device", "dtype", "compile")}
    if before:
        kept = {key: before[key] if value == "auto" else value for key, value in asked.items()}
        with suppress(ValueError):  # the run has moved to a machine without that device
            return replace(choose_engine(hardware, **kept), reasons=("as the run began",) * 3)
    flops = flops_per_token(model) * config.tokens_per_update * config.max_iters
    return choose_engine(hardware, **asked, flops=flops)


def build_state(config: TrainConfig, model: GPT, engine: Engine) -> TrainState:
    """The model on its device, with its optimizer, before the first update."""
    if engine.device_type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    model = model.to(engine.device)
    groups = parameter_groups(model, config.weight_decay)
    betas = (config.beta1, config.beta2)
    optimizer = OPTIMIZERS[config.optimizer](groups, lr=config.learning_rate, betas=betas)
    scaler = torch.amp.GradScaler(engine.device_type, enabled=engine.dtype == "float16")
    return TrainState(model, torch.compile(model) if engine.compile else model, optimizer, scaler)


# ------------------------------------------------------------------------------------------
# The run


@dataclass
class Run:
    """Objects that are ready, and what the loop asks of them."""

    config: TrainConfig
    folder: Path
    dataset: Dataset
    engine: Engine
    state: TrainState
    fresh: bool  # not resumed
    also: tuple[Callable[[dict], None], ...] = ()  # called with each row of metrics

    def record(self) -> None:
        """Write down what the run is."""
        if self.fresh:
            (self.folder / METRICS_FILE).unlink(missing_ok=True)
        content = {
            "config": asdict(self.config),
            "engine": self.engine.choices(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        write_text(self.folder / RUN_FILE, json.dumps(content, indent=2) + "\n")
        self.dataset.tokenizer.save(self.folder / TOKENIZER_FILE)

    def describe(self) -> None:
        """Say on the console what is about to happen, and why so."""
        config, engine, meta, step = self.config, self.engine, self.dataset.meta, self.state.step
        tokens, per_update = meta["train"]["tokens"], config.tokens_per_update
        epochs = config.max_iters * per_update / tokens
        print(
            f"run       {self.folder}, " + (f"resumed at step {step}" if step else "from step 0")
        )
        names = (engine.device, engine.dtype, "compiled" if engine.compile else "not compiled")
        for label, name, reason in zip(
            ("device", "precision", "compile"), names, engine.reasons, strict=True
        ):
            print(f"{label:9} {name} ({reason})")
        print(
            f"data      {self.dataset.folder}: {tokens:,} tokens for training, "
            f"{meta['val']['tokens']:,} for validation, {config.vocab_size:,} different ones"
        )
        print(f"model     {count_parameters(self.state.model):,} parameters")
        print(f"updates   {config.max_iters:,} of {per_update:,} tokens each: {epochs:.2f} epochs")
        if self.fresh and config.init_from in ("scratch", "auto"):
            guess = f"ln({config.vocab_size}) = {math.log(config.vocab_size):.4f}"
            print(f"loss      starts near that of a blind guess, {guess}")
        flops = flops_per_token(self.state.model) * per_update * (config.max_iters - step)
        seconds = flops / (CPU_FLOPS_PER_THREAD * torch.get_num_threads())
        if engine.device_type == "cpu" and seconds > 3600 and not config.eval_only:
            print(
                f"warning   this run takes a CPU like this one about {metrics.duration(seconds)}; "
                "config/shakespeare_cpu.py and config/pydocs.py are made for CPUs"
            )

    def train(self) -> None:
        """Train from where the state stands to the end of the run."""
        started = time.perf_counter()
        config, gpu = self.config, self.engine.device_type == "cuda"
        peak = metrics.peak_flops(torch.cuda.get_device_name()) if gpu else None
        self.log = metrics.Metrics(
            self.folder / METRICS_FILE,
            start=self.state.step,
            max_iters=config.max_iters,
            eval_interval=config.eval_interval,
            log_interval=config.log_interval,
            tokens_per_update=config.tokens_per_update,
            flops_per_token=flops_per_token(self.state.model),
            peak=None if self.engine.dtype == "float32" else peak,
            also=self.also,
        )
        train(
            self.state,
            self.engine,
            micro_batches=self.micro_batches,
            learning_rate=config.rate,
            max_iters=config.max_iters,
            eval_interval=config.eval_interval,
            grad_clip=config.grad_clip,
            seed=config.seed,
            evaluate=self.evaluate_and_save,
            report=self.log.update,
        )
        if self.state.step == 0:
            return
        best, seconds = self.state.best_val_loss, time.perf_counter() - started
        bits = bits_per_byte(best, self.dataset.bytes_per_token)
        print(f"done      in {metrics.duration(seconds)}")
        print(
            f"best      validation loss {best:.4f}, perplexity {perplexity(best):.2f}, "
            f"{bits:.4f} bits per byte"
        )
        print(f"          sample from it with: python sample.py --out_dir={self.folder}")

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """The data of an update."""
        config, n = self.config, self.config.gradient_accumulation_steps
        shape = {"batch_size": config.batch_size, "block_size": config.block_size}
        for i in range(step * n, (step + 1) * n):
            yield self.checked(training_batch(self.dataset.train, i, **shape, seed=config.seed))

    def checked(self, batch: Batch) -> Batch:
        """The batch, if the model has an embedding for each of its ids."""
        for ids in batch:
            check_ids(ids, self.config.vocab_size)
        return batch

    def evaluate(self) -> dict[str, float]:
        """The loss on fixed windows of both splits, and the validation loss as bits per byte."""
        config = self.config
        whole = math.ceil((len(self.dataset.val) - 1) / config.block_size / config.batch_size)
        losses = {}
        for split, n in (("train", config.eval_iters or whole), ("val", config.eval_iters)):
            batches = evaluation_batches(
                getattr(self.dataset, split),
                batch_size=config.batch_size,
                block_size=config.block_size,
                n_batches=n,
            )
            moved = (self.engine.move(*self.checked(batch)) for batch in batches)
            losses[f"{split}_loss"] = evaluate(
                self.state.model, moved, autocast=self.engine.autocast
            )
        bpb = bits_per_byte(losses["val_loss"], self.dataset.bytes_per_token)
        return {**losses, "bits_per_byte": bpb}

    def evaluate_and_save(self) -> None:
        """Evaluate, write a checkpoint (not of step 0), redraw the loss, show a sample."""
        config, state, started = self.config, self.state, time.perf_counter()
        losses = self.evaluate()
        print(self.loss_line(losses), flush=True)
        self.log.evaluation(state.step, seconds=time.perf_counter() - started, **losses)
        if not math.isfinite(losses["val_loss"]):
            print("warning   the loss is not finite: no checkpoint is written", flush=True)
            return
        if state.step > 0:
            if self.fresh:  # an older run goes only now that there is something in its place
                checkpoint.remove_all(self.folder)
                self.fresh = False
            best = losses["val_loss"] < state.best_val_loss
            state.best_val_loss = min(state.best_val_loss, losses["val_loss"])
            keep = config.keep_checkpoints if config.always_save_checkpoint else 1
            setting = {"config": asdict(config), "engine": self.engine.choices()}
            setting["text"] = self.dataset.meta["train"]["sha256"]
            checkpoint.save(self.folder, {**state.state_dict(), **setting}, best=best, keep=keep)
        size = count_parameters(state.model)
        title = f"{self.folder.name}: {config.dataset}, {size:,} parameters"
        try:
            metrics.draw_losses(self.folder / METRICS_FILE, self.folder / PICTURE, title=title)
        except OSError as error:  # no reason to end a run
            print(f"warning   no picture of the loss: {error}")
        if config.sample_tokens:
            print("\n".join(f"    | {line}" for line in self.sample().split("\n")), flush=True)

    def loss_line(self, losses: dict[str, float]) -> str:
        """An evaluation as a line for the console."""
        numbers = " | ".join(
            f"{name.replace('_', ' ')} {value:.4f}" for name, value in losses.items()
        )
        return f"step {self.state.step:6d} | {numbers}"

    def sample(self) -> str:
        """How the model begins a document now; with characters, a line."""
        tokenizer, device = self.dataset.tokenizer, self.engine.device
        end = tokenizer.end_of_text
        try:
            start = tokenizer.encode("\n") if end is None else [end]
        except ValueError:  # an alphabet without line ends
            start = [0]
        self.state.model.eval()
        stream = generate(
            self.state.model,
            torch.tensor([start], device=device),
            max_new_tokens=self.config.sample_tokens,
            temperature=0.8,
            generator=torch.Generator(device).manual_seed(self.config.seed),
        )
        text = tokenizer.decode(takewhile(lambda token: token != end, map(int, stream)))
        self.state.model.train()
        return text.strip("\n")
