"""A run: objects that are ready, and what the loop asks of them."""

import json
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from itertools import islice, takewhile
from pathlib import Path

import torch
from torch import Tensor

from nanolm.batches import Batch
from nanolm.evaluation import bits_per_byte, evaluate, perplexity
from nanolm.model import count_parameters, flops_per_token
from nanolm.parallel import World
from nanolm.precision import Engine
from nanolm.runs import checkpoint
from nanolm.runs import log as metrics
from nanolm.runs.folder import METRICS_FILE, PICTURE, RUN_FILE
from nanolm.runs.processes import from_first, heed
from nanolm.runs.settings import TrainConfig
from nanolm.sampling import generate
from nanolm.system.files import sync, write_text
from nanolm.system.signals import SIGNALS, STOP, Noted, Stopped, noting
from nanolm.tasks.causal import CausalTask
from nanolm.text.data import Dataset
from nanolm.text.tokenizer import TOKENIZER_FILE
from nanolm.training import NotFinite, TrainState, train

# What training reaches on a core of an ordinary CPU, in float32: for a first estimate of its time.
CPU_FLOPS_PER_THREAD = 2e10


@dataclass
class Run:
    """Objects that are ready, and what the loop asks of them."""

    config: TrainConfig
    folder: Path
    dataset: Dataset
    engine: Engine
    state: TrainState
    world: World
    fresh: bool  # not resumed
    log: metrics.Metrics | None = None  # of process 0
    noted: Noted = field(default_factory=Noted)  # the signals that wait for an answer

    def is_finished(self) -> bool:
        """Whether the run was resumed where nothing is left to do."""
        state, n = self.state, self.config.max_iters
        return not self.fresh and state.step >= n and state.evaluated == state.step

    def record(self) -> None:
        """Open the log and write down what the run is, in the place of what was there."""
        config, step = self.config, self.state.step
        also = ()
        if config.wandb_log:
            name = config.wandb_run_name or self.folder.name
            also = (metrics.wandb_log(config.wandb_project, name, asdict(config)),)
        if self.fresh:
            for name in (RUN_FILE, METRICS_FILE):  # without run.json no restart takes up the rest
                (self.folder / name).unlink(missing_ok=True)
            checkpoint.remove_all(self.folder)
        checkpoint.set_aside(self.folder, after=step)
        content = {
            "config": asdict(config),
            "engine": self.engine.choices(),
            "processes": self.world.size,
            "launch": self.world.launch,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        write_text(self.folder / RUN_FILE, json.dumps(content, indent=2) + "\n")
        self.dataset.tokenizer.save(self.folder / TOKENIZER_FILE)
        gpu = self.engine.device_type == "cuda" and self.engine.dtype != "float32"
        peak = metrics.peak_flops(torch.cuda.get_device_name()) if gpu else None
        self.log = metrics.Metrics(
            self.folder / METRICS_FILE,
            start=step,
            evaluated=self.state.evaluated,
            max_iters=config.max_iters,
            eval_interval=config.eval_interval,
            log_interval=config.log_interval,
            tokens_per_update=config.tokens_per_update,
            flops_per_token=flops_per_token(self.state.model),
            peak=peak and peak * self.world.size,
            also=also,
        )

    def describe(self) -> None:
        """Say on the console what is about to happen, and why so."""
        config, engine, meta, step = self.config, self.engine, self.dataset.meta, self.state.step
        tokens, per_update = meta["train"]["tokens"], config.tokens_per_update
        epochs = config.max_iters * per_update / tokens
        given = config.init_from not in ("scratch", "auto") and self.fresh
        start = f"the weights of {config.init_from}" if given else "step 0"
        print(
            f"run       {self.folder}, " + (f"resumed at step {step}" if step else f"from {start}")
        )
        names = (engine.device, engine.dtype, "compiled" if engine.compile else "not compiled")
        for label, name, reason in zip(
            ("device", "precision", "compile"), names, engine.reasons, strict=True
        ):
            print(f"{label:9} {name} ({reason})")
        if self.world.size > 1:
            n = config.gradient_accumulation_steps // self.world.size
            print(f"processes {self.world.size}, with {n} of an update's micro-batches each")
        print(
            f"data      {self.dataset.folder}: {tokens:,} tokens for training, "
            f"{meta['val']['tokens']:,} for validation, {config.vocab_size:,} different ones"
        )
        print(f"model     {count_parameters(self.state.model):,} parameters")
        if config.eval_only:
            return
        print(f"updates   {config.max_iters:,} of {per_update:,} tokens each: {epochs:.2f} epochs")
        if self.fresh and config.init_from in ("scratch", "auto"):
            guess = f"ln({config.vocab_size}) = {math.log(config.vocab_size):.4f}"
            print(f"loss      starts near that of a blind guess, {guess}")
        flops = flops_per_token(self.state.model) * per_update * (config.max_iters - step)
        seconds = flops / (CPU_FLOPS_PER_THREAD * torch.get_num_threads())
        if engine.device_type == "cpu" and seconds > 3600:
            print(
                f"warning   this run takes a CPU like this one about {metrics.duration(seconds)}; "
                "config/shakespeare_cpu.py and config/pydocs.py are made for CPUs"
            )

    def train(self) -> None:
        """Train from where the state stands to the end of the run, or until a signal comes.

        Raises Stopped in that case, and NotFinite where training breaks down.
        """
        started, config = time.perf_counter(), self.config
        try:
            with noting(say=self.world.leads) as self.noted:
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
                    report=self.log.update if self.log else lambda step, **numbers: None,
                    flags=self.take_signals,
                    answer=self.answer_signals,
                    world=self.world,
                )
        except NotFinite as error:
            advice = "and a lower learning_rate, or dtype=float32"
            raise NotFinite(f"{error}; {self.way_back()} {advice}") from None
        except Stopped as stop:
            raise Stopped(stop.number, f"{stop}; {self.way_back()}") from None
        except BrokenPipeError:  # nobody reads the console any more
            raise
        except OSError as error:
            raise ValueError(f"{error}; {self.way_back()}") from None
        if self.state.best_val_loss is not None:
            self.describe_end(time.perf_counter() - started)

    def describe_end(self, seconds: float) -> None:
        """Say on the console what came out, and how to use it."""
        best = self.state.best_val_loss
        bits = bits_per_byte(best, self.dataset.bytes_per_token)
        print(f"done      in {metrics.duration(seconds)}")
        print(
            f"best      validation loss {best:.4f}, perplexity {perplexity(best):.2f}, "
            f"{bits:.4f} bits per byte"
        )
        print(f"          sample from it with: python sample.py --out_dir={self.folder}")

    @cached_property
    def task(self) -> CausalTask:
        """What the model is trained for."""
        keys = {field.name: getattr(self.config, field.name) for field in fields(CausalTask)}
        return CausalTask(**keys)

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """The data of an update."""
        n = self.config.gradient_accumulation_steps
        for i in range(step * n, (step + 1) * n):
            yield self.task.batch(self.dataset, i)

    def evaluate(self) -> dict[str, float]:
        """The loss on fixed batches of both splits, and what else the task makes of it."""
        losses = {}
        for split in ("train", "val"):
            losses[f"{split}_loss"] = evaluate(
                self.state.model,
                self.my_share(self.task.evaluation(self.dataset, split)),
                autocast=self.engine.autocast,
                add_up=self.world.add_up,
            )
        return losses | self.task.score(losses["val_loss"], self.dataset)

    def my_share(self, batches: Iterator[Batch]) -> Iterator[dict[str, Tensor]]:
        """Of every world.size batches one, on the device; Stopped where a signal has come."""
        while turn := list(islice(batches, self.world.size)):
            heed(self.world, self.noted)  # an evaluation can take longer than a scheduler waits
            if self.world.rank < len(turn):
                yield self.engine.move(turn[self.world.rank])

    def evaluate_and_save(self) -> None:
        """Evaluate, write a checkpoint (not of step 0), redraw the loss, show a sample.

        A signal to stop ends the evaluation; the run that goes on begins with it.
        """
        state, started = self.state, time.perf_counter()
        try:
            losses = self.evaluate()
        except Stopped:
            if state.step > 0:
                self.save_for_signal()
            raise
        state.evaluated = state.step
        print(self.loss_line(losses), flush=True)
        if self.log:
            self.log.evaluation(state.step, seconds=time.perf_counter() - started, **losses)
        loss = losses["val_loss"]
        if not math.isfinite(loss):
            if state.step >= self.config.max_iters:
                raise NotFinite("the last evaluation's loss is not finite")
            print("warning   the loss is not finite: no checkpoint is written", flush=True)
            return
        if state.step > 0:
            best = state.best_val_loss is None or loss < state.best_val_loss
            if best:
                state.best_val_loss = loss
            from_first(self.world, lambda: self.save(best=best))
        if self.world.leads:
            self.show()

    def take_signals(self) -> list[bool]:
        """Which of SIGNALS have come since the last call."""
        came = self.noted.take()
        return [number in came for number in SIGNALS]

    def answer_signals(self, came: list[bool]) -> None:
        """Save, and leave where a signal to stop is among those that came to any process."""
        self.save_for_signal()
        for number, flag in zip(SIGNALS, came, strict=True):
            if flag and number in STOP:
                raise Stopped(number)

    def save_for_signal(self) -> None:
        """Write a checkpoint between two evaluations."""
        from_first(self.world, self.save)
        print(f"saved     step {self.state.step} in {self.folder}", flush=True)

    def save(self, *, best: bool = False) -> None:
        """Write a checkpoint. Raises ValueError where that fails, with the way back."""
        config, setting = self.config, {"config": asdict(self.config)}
        setting |= {"engine": self.engine.choices(), "text": self.dataset.meta["train"]["sha256"]}
        content = {**self.state.state_dict(), **setting}
        if not checkpoint.is_finite(content):
            raise ValueError(f"the weights are not finite any more; {self.way_back()}")
        keep = config.keep_checkpoints if config.always_save_checkpoint else 1
        sync(self.folder / METRICS_FILE)  # what it tells of earlier steps is as safe as they are
        try:
            checkpoint.save(self.folder, content, best=best, keep=keep)
        except ValueError as error:
            raise ValueError(f"{error}; {self.way_back()}") from None

    def way_back(self) -> str:
        """What is left of the run where it cannot go on."""
        steps, way = checkpoint.step_files(self.folder), self.config.init_from
        if not steps:
            return f"there is no checkpoint yet: start again with --init_from={way}"
        return f"the last checkpoint is {steps[-1]}: continue from it with --init_from=resume"

    def show(self) -> None:
        """Redraw the loss, and print how the model writes now."""
        size = count_parameters(self.state.model)
        title = f"{self.folder.name}: {self.config.dataset}, {size:,} parameters"
        try:
            metrics.draw_losses(self.folder / METRICS_FILE, self.folder / PICTURE, title=title)
        except Exception as error:  # whatever it is, it is no reason to end a run
            print(f"warning   no picture of the loss: {error}")
        if self.config.sample_tokens:
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
        end, start = tokenizer.end_of_text, self.task.opening(tokenizer)
        self.state.model.eval()
        stream = generate(
            self.state.model,
            torch.tensor([start], device=device),
            max_new_tokens=self.config.sample_tokens,
            temperature=0.8,
            generator=torch.Generator(device).manual_seed(self.config.seed),
        )
        tokens = takewhile(lambda token: token != end and not self.noted, map(int, stream))
        text = tokenizer.decode(tokens)
        self.state.model.train()
        return text.strip("\n")
