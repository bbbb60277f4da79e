"""A run: objects that are ready, and what the loop asks of them (see training.Run)."""

import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanolm.batches import Batch
from nanolm.evaluation import evaluate
from nanolm.loss import NO_TARGET
from nanolm.model import count_parameters, flops_per_token
from nanolm.parallel import World
from nanolm.precision import Engine
from nanolm.runs import checkpoint, pictures
from nanolm.runs.folder import CONFUSION, METRICS_FILE, RUN_FILE, resuming
from nanolm.runs.log import Log, peak_flops, wandb_log
from nanolm.runs.processes import any_of, broadcast
from nanolm.runs.settings import TrainConfig
from nanolm.system.files import sync, write_text
from nanolm.system.signals import SIGNALS, STOP, Signals, Stopped, collecting
from nanolm.system.workers import progress
from nanolm.text.data import Dataset
from nanolm.text.tokenizer import TOKENIZER_FILE
from nanolm.training import NotFinite, TrainState, train


@dataclass
class Run:
    """Objects that are ready, and what the loop asks of them."""

    config: TrainConfig
    folder: Path
    dataset: Dataset
    task: Any  # see tasks/
    engine: Engine
    state: TrainState
    world: World
    log: Log | None = None  # of process 0
    confusion: np.ndarray | None = None  # of the labels, at the last evaluation
    tokens: int = 0  # of the last update, without what fills up its rows
    signals: Signals = field(default_factory=Signals)  # those that wait for an answer

    def is_finished(self) -> bool:
        """Whether there is nothing left to do."""
        state = self.state
        return state.step >= self.config.max_iters and state.evaluated == state.step

    # --------------------------------------------------------------------------------------
    # What is written down

    def record(self, *, fresh: bool) -> None:
        """Write down what the run is; a fresh one replaces what was there."""
        also = self.other_logs()
        if fresh:
            for name in (RUN_FILE, METRICS_FILE):  # without run.json no restart takes up the rest
                (self.folder / name).unlink(missing_ok=True)
            checkpoint.remove_all(self.folder)
        checkpoint.set_aside(self.folder, after=self.state.step)
        content = {
            "config": asdict(self.config),
            "engine": self.engine.choices(),
            "processes": self.world.size,
            "launch": self.world.launch,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        write_text(self.folder / RUN_FILE, json.dumps(content, indent=2) + "\n")
        self.dataset.tokenizer.save(self.folder / TOKENIZER_FILE)
        self.log = self.open_log(also)

    def other_logs(self) -> list[Callable[[dict], None]]:
        """What else is to hear of each row of the log."""
        config = self.config
        if not config.wandb_log:
            return []
        name = config.wandb_run_name or self.folder.name
        return [wandb_log(config.wandb_project, name, asdict(config))]

    def open_log(self, also: list[Callable[[dict], None]]) -> Log:
        """The log, from where the run stands on."""
        state, peak = self.state, None
        if self.engine.device_type == "cuda" and self.engine.dtype != "float32":
            peak = peak_flops(torch.cuda.get_device_name())
        return Log(
            self.folder / METRICS_FILE,
            self.config,
            start=state.step,
            evaluated=state.evaluated,
            flops_per_token=flops_per_token(state.model),
            peak=peak and peak * self.world.size,
            also=also,
        )

    def save(self, *, best: bool = False) -> None:
        """Write a checkpoint. Raises ValueError where that fails, with the way back."""
        state = self.state.state_dict(self.world)
        broadcast(self.world, lambda: self.write(state, best))

    def write(self, state: dict, best: bool) -> None:
        """Write the whole state of the run to a file."""
        config = self.config
        content = {
            **state,
            "config": asdict(config),
            "engine": self.engine.choices(),
            "text": self.dataset.meta["train"]["sha256"],
        }
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
        steps = checkpoint.step_files(self.folder)
        if not steps:
            return "no checkpoint yet: start again"
        return f"the last checkpoint is {steps[-1]}: continue with {resuming(self.folder)}"

    # --------------------------------------------------------------------------------------
    # Training

    def train(self) -> None:
        """Train from where the state stands to the end of the run, or until a signal comes.

        Raises Stopped in that case, and NotFinite where training breaks down.
        """
        try:
            with collecting(say=self.world.leads) as self.signals:
                train(self)
        except NotFinite as error:
            precise = "" if self.engine.dtype == "float32" else " or dtype=float32"
            advice = f"with a lower learning_rate{precise}"
            raise NotFinite(f"{error}; {self.way_back()}, {advice}") from None
        except Stopped as stop:
            raise Stopped(stop.number, f"{stop}; {self.way_back()}") from None
        except OSError as error:
            raise ValueError(f"{error}; {self.way_back()}") from None

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """The data of an update."""
        n = self.config.gradient_accumulation_steps
        self.tokens = 0
        for i in range(step * n, (step + 1) * n):
            batch = self.task.batch(self.dataset, i)
            self.tokens += self.task.n_tokens(batch)
            yield batch

    def report(self, step: int, **numbers: float) -> None:
        """Log an update."""
        if self.log:
            self.log.update(step, tokens=self.tokens, **numbers)

    def requests(self) -> list[bool]:
        """Which signals have come to this process since the last call."""
        came = self.signals.take()
        return [number in came for number in SIGNALS]

    def answer(self, requested: list[bool]) -> None:
        """Save, and leave where one of the signals was to stop."""
        self.save_for_signal()
        for number, flag in zip(SIGNALS, requested, strict=True):
            if flag and number in STOP:
                raise Stopped(number)

    def save_for_signal(self) -> None:
        """Write a checkpoint between two evaluations."""
        self.save()
        print(f"saved     step {self.state.step} in {self.folder}", flush=True)

    # --------------------------------------------------------------------------------------
    # Evaluation

    def evaluate(self) -> None:
        """Evaluate, show a sample, write a checkpoint (not of step 0), redraw the loss.

        A signal to stop ends the evaluation; the run that goes on begins with it. The sample
        belongs to what is logged before the checkpoint: a run killed later has not lost it.
        """
        state, started = self.state, time.perf_counter()
        try:
            scores = self.scores()
            score = self.config.score_of(scores)
            sample = None
            if self.config.sample_tokens and math.isfinite(score):
                sample = self.sample() if self.world.splits else broadcast(self.world, self.sample)
            self.leave_if_asked()  # a sample that was cut short is none
        except Stopped:
            if state.step > 0:
                self.save_for_signal()
            raise
        state.evaluated = state.step
        if self.log:
            seconds = time.perf_counter() - started
            self.log.evaluation(state.step, scores, seconds=seconds, sample=sample)
        if not math.isfinite(score):
            if state.step >= self.config.max_iters:
                raise NotFinite("the last evaluation's loss is not finite")
            print("warning   the loss is not finite: no checkpoint is written", flush=True)
            return
        if state.step > 0:
            best = state.best is None or score < state.best
            if best:
                state.best = score
            self.save(best=best)
        if self.world.leads:
            self.draw()

    def scores(self) -> dict[str, float]:
        """The loss on fixed batches of both splits, and what else the task scores on val."""
        scores = {}
        for split in ("train", "val"):
            counts = evaluate(
                self.state.model,
                self.my_share(self.task.evaluation(self.dataset, split), split),
                tally=self.task.tally,
                autocast=self.engine.autocast,
                all_reduce=self.world.all_reduce,
            )
            score, self.confusion = self.task.score(counts, self.dataset), self.task.matrix(counts)
            scores[f"{split}_loss"] = score.pop("loss")
        return scores | score

    def my_share(self, batches: Iterator[Batch], split: str) -> Iterator[dict[str, Tensor]]:
        """Of every world.replicas batches one, on the device; Stopped where a signal has come.

        Where there are too few for all, the last one without its targets: it counts for nothing.
        """
        rank, n = self.world.replica, self.task.evaluation_size(self.dataset)
        with progress(desc=f"evaluating {split}", total=n, unit="batch", leave=False) as bar:
            while turn := list(islice(batches, self.world.replicas)):
                self.leave_if_asked()  # an evaluation can take longer than a scheduler waits
                own = [min(rank, len(turn) - 1)]
                if self.world.splits and any("ids" not in batch for batch in turn):
                    own = range(len(turn))  # answers take many passes, which all make together
                for i in own:
                    batch = turn[i]
                    if i != rank:
                        batch = batch | {"targets": batch["targets"] * 0 + NO_TARGET}
                    yield self.engine.move(batch)
                bar.update(len(turn))

    def leave_if_asked(self) -> None:
        """Raise Stopped in all processes where a signal to stop has come to any of them."""
        asked = any_of(self.world, [number in self.signals for number in STOP])
        for number, flag in zip(STOP, asked, strict=True):
            if flag:
                raise Stopped(number)

    def draw(self) -> None:
        """Redraw the loss."""
        size = count_parameters(self.state.model)
        title = f"{self.folder.name}: {self.config.dataset}, {size:,} parameters"
        try:
            pictures.draw_losses(self.folder, self.config, title=title)
            if self.confusion is not None:
                labels = self.config.labels
                pictures.draw_confusion(self.confusion, labels, self.folder / CONFUSION)
        except Exception as error:  # whatever it is, it is no reason to end a run
            print(f"warning   no picture: {error}")

    def gives_up(self) -> bool:
        """Whether this process need not finish its sample; those that share a model go on."""
        return not self.world.splits and bool(self.signals.intersection(STOP))

    def sample(self) -> tuple[str, str]:
        """A title, and a text that shows what the model does now (see the task's show)."""
        model = self.state.model.eval()
        generator = torch.Generator(self.engine.device).manual_seed(self.config.seed)
        with self.engine.autocast():
            title, pieces = self.task.show(
                model, self.dataset, tokens=self.config.sample_tokens, generator=generator
            )
            text = "".join(takewhile(lambda _: not self.gives_up(), pieces))
        model.train()
        return title, text.strip("\n")
