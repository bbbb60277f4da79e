"""Training: the state, the update, the loop.

An update makes the model a little less surprised by a batch of text:

    loss     = mean surprise at each next token          forward
    gradient = d loss / d weights                        backward, added up over the micro-batches
    weights  = weights - rate * direction(gradient)      optimizer, after clipping

A batch too large for the memory is cut into micro-batches whose gradients add up to that of the
whole: each micro-loss is weighted by its share of the update's targets, so that the sum is the
mean over all of them, however they are spread.

Nothing here is remembered outside TrainState. The data of an update and the seed of its dropout
follow from the step number; so a run that continues from a saved state is, to the last bit, the
run that never stopped. Several processes deal out the micro-batches of an update among them, and
make the same update as one.
"""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from nanolm.batches import Batch
from nanolm.loss import NO_TARGET
from nanolm.model import GPT
from nanolm.parallel import ALONE, World
from nanolm.precision import Engine

MAX_SKIPPED = 3  # non-finite updates in a row before a run gives up


class NotFinite(ValueError):
    """Several updates in a row had a loss or a gradient that is not finite."""


@dataclass
class TrainState:
    """All that training changes."""

    model: GPT
    forward: Callable  # what training calls: the model, compiled or not, shared or not
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # scales fp16 losses, so that small gradients do not vanish
    step: int = 0  # updates made
    evaluated: int = -1  # the last step at which the model was evaluated
    best_val_loss: float | None = None  # of all evaluations after step 0
    skipped: int = 0  # non-finite updates in a row, up to now

    def state_dict(self) -> dict:
        """The state as a checkpoint holds it."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "evaluated": self.evaluated,
            "best_val_loss": self.best_val_loss,
            "skipped": self.skipped,
        }

    def load_state_dict(self, saved: dict) -> None:
        """Continue from what state_dict gave; the optimizer keeps its own decay and betas."""
        self.model.load_state_dict(saved["model"])
        groups = self.optimizer.param_groups
        moving = ("params", "lr")  # each update sets its own rate
        options = [{k: v for k, v in group.items() if k not in moving} for group in groups]
        self.optimizer.load_state_dict(saved["optimizer"])
        for group, mine in zip(self.optimizer.param_groups, options, strict=True):
            group.update(mine)
        if saved["scaler"]:  # empty where the run was not in fp16 before
            self.scaler.load_state_dict(saved["scaler"])
        self.step, self.evaluated = saved["step"], saved["evaluated"]
        self.best_val_loss, self.skipped = saved["best_val_loss"], saved["skipped"]


def dropout_seed(seed: int, step: int, micro_step: int) -> int:
    """A 64-bit seed that differs for every micro-batch of every run."""
    return int(np.random.SeedSequence((seed, step, micro_step)).generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch on the device."""

    number: int  # among the micro-batches of its update
    batch: dict[str, torch.Tensor]  # the arguments of forward
    weight: float  # its part of the update's targets


def deal(micro_batches: Iterable[Batch], engine: Engine, world: World = ALONE) -> list[MicroBatch]:
    """The micro-batches of an update that are this process's: every world.size-th of them."""
    micro_batches = list(micro_batches)
    n_targets = [int((batch["targets"] != NO_TARGET).sum()) for batch in micro_batches]
    return [
        MicroBatch(j, engine.move(micro_batches[j]), n_targets[j] / max(1, sum(n_targets)))
        for j in range(world.rank, len(micro_batches), world.size)
    ]


class Prefetch:
    """What deal gives for each update; dealt while a GPU still works on the one before."""

    def __init__(
        self,
        micro_batches: Callable[[int], Iterable[Batch]],
        engine: Engine,
        *,
        world: World = ALONE,
        end: int,
    ):
        self.deal = lambda step: deal(micro_batches(step), engine, world)
        self.end, self.ahead = end, {}

    def prepare(self, step: int) -> None:
        """Deal the micro-batches of update number step, if there is one: end updates are made."""
        self.ahead = {step: self.deal(step)} if step < self.end else {}

    def take(self, step: int) -> list[MicroBatch]:
        """The micro-batches of update number step, prepared or not."""
        return self.ahead.pop(step, None) or self.deal(step)


def accumulate_gradients(
    state: TrainState,
    micro_batches: list[MicroBatch],
    engine: Engine,
    *,
    seed: int,
    world: World = ALONE,
) -> torch.Tensor:
    """Add the gradient of the update's mean loss to the parameters.

    Of several processes, each has its own micro-batches; after the last one DDP adds up the
    gradients of all (it would after each one: no_sync holds it back, around forward and backward).
    Returns this process's part of the loss, on the device.
    """
    loss = torch.zeros((), device=engine.device)
    for micro_batch in micro_batches:
        torch.manual_seed(dropout_seed(seed, state.step, micro_batch.number))
        alone = world.size == 1 or micro_batch is micro_batches[-1]
        with nullcontext() if alone else state.forward.no_sync():
            with engine.autocast():
                _, micro_loss = state.forward(**micro_batch.batch)
            # DDP takes the mean over the processes, where the sum is wanted
            state.scaler.scale(micro_loss * (micro_batch.weight * world.size)).backward()
        loss += micro_loss.detach() * micro_batch.weight
    return loss


def settle_gradients(state: TrainState, batch: Batch, engine: Engine) -> None:
    """Go forward and backward once and forget the gradients.

    DDP sends gradients in the order of the first backward pass, but only from the second on. Sums
    of three numbers depend on their order; after this, every update, also the first after
    resuming, adds up alike.
    """
    with engine.autocast():
        _, loss = state.forward(**engine.move(batch))
    loss.backward()
    state.optimizer.zero_grad(set_to_none=True)


def update(
    state: TrainState,
    micro_batches: list[MicroBatch],
    engine: Engine,
    *,
    learning_rate: float,
    grad_clip: float,
    seed: int,
    world: World = ALONE,
    flags: Callable[[], list[bool]] = list,
    meanwhile: Callable[[], None] = lambda: None,
) -> tuple[float, float, list[bool]]:
    """Make one update and count it.

    The gradient is scaled down to the norm grad_clip where it is longer (Pascanu et al. 2013); 0
    turns this off. A loss or gradient that is not finite is counted, but not applied. meanwhile is
    called after the work of a GPU is queued and before its result is waited for. Returns the loss,
    the unclipped norm of its gradient, and which flags any process has raised (flags gives
    this one's, once the gradients are there).
    """
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    loss = accumulate_gradients(state, micro_batches, engine, seed=seed, world=world)
    message = world.sum_up(loss, flags())
    state.scaler.unscale_(state.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), grad_clip or math.inf)
    numbers = torch.cat((norm[None], message))
    meanwhile()
    norm, loss, *raised = numbers.tolist()  # the one wait for a GPU
    if math.isfinite(loss) and math.isfinite(norm):
        with engine.autocast():  # Muon has matrix products, the others none
            state.scaler.step(state.optimizer)
        state.skipped = 0
    elif not fp16_scale_is_settling(state, loss):
        state.skipped += 1
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    return loss, norm, [bool(n) for n in raised]


def fp16_scale_is_settling(state: TrainState, loss: float) -> bool:
    """Whether an infinite gradient only says that the fp16 loss scale is still too high."""
    return math.isfinite(loss) and state.scaler.is_enabled() and state.scaler.get_scale() >= 1


def train(
    state: TrainState,
    engine: Engine,
    *,
    micro_batches: Callable[[int], Iterable[Batch]],
    learning_rate: Callable[[int], float],
    max_iters: int,
    eval_interval: int,
    grad_clip: float,
    seed: int,
    evaluate: Callable[[], None],
    report: Callable[..., None],
    flags: Callable[[], list[bool]] = list,
    answer: Callable[[list[bool]], None] = lambda raised: None,
    world: World = ALONE,
) -> None:
    """The loop: update the state until it has made max_iters updates.

    micro_batches and learning_rate give the data and the rate of update number step, from 0.
    evaluate is called before the first update, after every eval_interval, and after the last;
    report after each update, with its numbers; answer, with the flags that any process has raised
    (see update), where there is one. Raises NotFinite when several updates in a row are not.
    """
    state.model.train()
    prefetch = Prefetch(micro_batches, engine, world=world, end=max_iters)
    while True:
        due = state.step % eval_interval == 0 or state.step >= max_iters
        if due and state.evaluated != state.step:
            evaluate()
        if state.step >= max_iters:
            return
        started, step = time.perf_counter(), state.step
        rate = learning_rate(step)
        loss, norm, raised = update(
            state,
            prefetch.take(step),
            engine,
            learning_rate=rate,
            grad_clip=grad_clip,
            seed=seed,
            world=world,
            flags=flags,
            meanwhile=lambda: prefetch.prepare(state.step + 1),
        )
        report(step, loss=loss, lr=rate, grad_norm=norm, seconds=time.perf_counter() - started)
        if state.skipped >= MAX_SKIPPED:
            raise NotFinite(
                f"{state.skipped} updates in a row were not finite, the last one in step {step} "
                f"(loss {loss}, gradient norm {norm})"
            )
        if any(raised):
            answer(raised)
