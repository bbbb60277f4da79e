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

All that it takes to train, from a text of eleven letters that repeats itself:

>>> import numpy as np, torch
>>> from nanolm.layers import ModelConfig
>>> from nanolm.model import build_model
>>> from nanolm.batches import training_batch
>>> tokens = np.arange(1000) % 11
>>> shape = {"vocab_size": 11, "block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 32}
>>> model = build_model(ModelConfig(**shape))
>>> state = TrainState(model, torch.optim.AdamW(model.parameters()))
>>> for step in range(100):
...     batch = training_batch(tokens, step, batch_size=4, block_size=8, seed=0)
...     loss, norm, _ = update(state, [batch], learning_rate=1e-2)
...     if step == 0:
...         print(f"a blind guess: {loss:.1f}")
a blind guess: 2.4
>>> print(f"after {state.step} updates: {loss:.1f}")
after 100 updates: 0.0
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nanolm.batches import Batch
from nanolm.layers import Block
from nanolm.loss import NO_TARGET
from nanolm.model import GPT
from nanolm.optim import part_of, whole
from nanolm.parallel import ALONE, World, gathered
from nanolm.precision import CPU, Engine

MAX_SKIPPED = 3  # non-finite updates in a row before a run gives up


class NotFinite(ValueError):
    """Several updates in a row had a loss or a gradient that is not finite."""


@dataclass
class TrainState:
    """All that training changes."""

    model: GPT
    optimizer: torch.optim.Optimizer
    forward: Callable | None = None  # what training calls: the model, compiled or replicated
    scaler: torch.amp.GradScaler = field(default_factory=lambda: grad_scaler(CPU))
    step: int = 0  # updates made
    evaluated: int = -1  # the last step at which the model was evaluated
    best: float | None = None  # of all evaluations after step 0: the score; lower is better
    skipped: int = 0  # non-finite updates in a row, up to now

    def __post_init__(self):
        if self.forward is None:
            self.forward = self.model

    def state_dict(self, world: World = ALONE) -> dict:
        """The state as a checkpoint holds it: whole, in process 0. All must ask for it."""
        named = self.model.state_dict(keep_vars=True)
        weights = gathered({id(p): p.detach() for p in named.values()}, world)  # tied ones once
        return {
            "model": {name: weights[id(p)] for name, p in named.items()},
            "optimizer": gathered(self.optimizer.state_dict(), world),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "evaluated": self.evaluated,
            "best": self.best,
            "skipped": self.skipped,
        }

    @torch.no_grad()
    def load_state_dict(self, checkpoint: dict, world: World = ALONE) -> None:
        """Continue from what state_dict gave; the optimizer keeps its own decay and betas.

        That of process 0 counts, whatever the layout of the run that it comes from; what the
        others give says the shapes.
        """
        for name, own in self.model.state_dict().items():
            own.copy_(part_of(world.broadcast(checkpoint["model"][name]), own))
        groups = self.optimizer.param_groups
        options = [
            {k: v for k, v in group.items() if k not in ("params", "lr")} for group in groups
        ]
        parameters = [p for group in groups for p in group["params"]]
        memory = {
            i: {key: part_of(world.broadcast(value), parameters[i]) for key, value in own.items()}
            for i, own in checkpoint["optimizer"]["state"].items()
        }
        self.optimizer.load_state_dict({**checkpoint["optimizer"], "state": memory})
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)
        if checkpoint["scaler"]:  # empty where the run was not in fp16 before
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.step, self.evaluated = checkpoint["step"], checkpoint["evaluated"]
        self.best = checkpoint.get("best", checkpoint.get("best_val_loss"))  # its older name
        self.skipped = checkpoint["skipped"]


def recompute_blocks(model: nn.Module) -> None:
    """Let each block keep its input alone, and compute the rest again in the backward pass.

    Less memory for activations, for about a third more work (Chen et al. 2016, Training Deep Nets
    with Sublinear Memory Cost). The numbers are the same, those of dropout included.
    """
    for module in model.modules():
        if isinstance(module, Block):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def dropout_seed(seed: int, step: int, micro_step: int) -> int:
    """A 64-bit seed that differs for every micro-batch of every run."""
    return int(np.random.SeedSequence((seed, step, micro_step)).generate_state(1, np.uint64)[0])


def grad_scaler(engine: Engine) -> torch.amp.GradScaler:
    """Scales fp16 losses, so that small gradients do not vanish; leaves others alone."""
    return torch.amp.GradScaler(engine.device_type, enabled=engine.dtype == "float16")


def target_shares(micro_batches: list[Batch]) -> list[float]:
    """For each micro-batch, its part of all their targets."""
    counts = [int((batch["targets"] != NO_TARGET).sum()) for batch in micro_batches]
    return [n / max(1, sum(counts)) for n in counts]


def update(
    state: TrainState,
    micro_batches: Iterable[Batch],
    *,
    learning_rate: float,
    grad_clip: float = 1.0,
    seed: int = 0,
    engine: Engine = CPU,
    world: World = ALONE,
    requests: Callable[[], list[bool]] = list,
) -> tuple[float, float, list[bool]]:
    """Make one update and count it.

    The gradient is scaled down to the norm grad_clip where it is longer (Pascanu et al. 2013); 0
    turns this off. A loss or gradient that is not finite is counted, but not applied. Returns the
    loss, the unclipped norm of its gradient, and the answers to requests: yes-or-no questions of
    each process (has a signal come?), answered yes to all where one process says yes.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    micro_batches = list(micro_batches)
    shares = target_shares(micro_batches)
    total = torch.zeros((), device=engine.device)
    own = range(world.replica, len(micro_batches), world.replicas)  # those of this process
    for number in own:
        torch.manual_seed(dropout_seed(seed, state.step, number))
        world.sync_gradients(state.forward, number == own[-1])
        with engine.autocast():
            _, loss = state.forward(**engine.move(micro_batches[number]))  # forward
        loss = loss * shares[number]
        state.scaler.scale(loss * world.replicas).backward()  # backward; its sum is divided again
        total += loss.detach()
    sums = world.all_reduce(with_flags(total, requests()))
    state.scaler.unscale_(state.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), grad_clip or math.inf)
    numbers = torch.cat((whole(norm)[None], sums))
    norm, loss, *requested = numbers.tolist()  # the one wait for a GPU
    if math.isfinite(loss) and math.isfinite(norm):
        with engine.autocast():  # for the matrix products of Muon
            state.scaler.step(state.optimizer)
        state.skipped = 0
    elif not fp16_scale_is_settling(state, loss):
        state.skipped += 1
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    return loss, norm, [n > 0 for n in requested]


def with_flags(loss: torch.Tensor, flags: list[bool]) -> torch.Tensor:
    """The loss and the flags as one tensor, so that processes add them up in one message.

    Filled on the device: a copy to it would wait. Whether to apply an update needs no message of
    its own: a loss that is not finite shows in the sum, and the gradients are the same everywhere.
    """
    return torch.stack((loss, *(torch.full_like(loss, float(flag)) for flag in flags)))


def fp16_scale_is_settling(state: TrainState, loss: float) -> bool:
    """Whether an infinite gradient only says that the fp16 loss scale is still too high."""
    return math.isfinite(loss) and state.scaler.is_enabled() and state.scaler.get_scale() >= 1


class Run(Protocol):
    """What the loop asks of a run. That of train.py is in runs/run.py."""

    state: TrainState
    engine: Engine
    world: World
    config: Any  # with max_iters, eval_interval, grad_clip, seed, and rate(step)

    def micro_batches(self, step: int) -> Iterable[Batch]:
        """The data of update number step, from 0."""

    def evaluate(self) -> None:
        """Evaluate the model, and whatever is to be done at such times."""

    def report(
        self, step: int, *, loss: float, lr: float, grad_norm: float, seconds: float
    ) -> None:
        """Note an update's numbers."""

    def requests(self) -> list[bool]:
        """Which signals have come to this process since the last call."""

    def answer(self, requested: list[bool]) -> None:
        """Do what any process was asked for."""


def train(run: Run) -> None:
    """The loop: update the run's state until it has made max_iters updates.

    It evaluates before the first update, after every eval_interval of them, and after the last.
    Raises NotFinite when several updates in a row are not finite.
    """
    state, config = run.state, run.config
    state.model.train()
    while True:
        due = state.step % config.eval_interval == 0 or state.step >= config.max_iters
        if due and state.evaluated != state.step:
            run.evaluate()
        if state.step >= config.max_iters:
            return
        started, step, rate = time.perf_counter(), state.step, config.rate(state.step)
        loss, norm, requested = update(
            state,
            run.micro_batches(step),
            learning_rate=rate,
            grad_clip=config.grad_clip,
            seed=config.seed,
            engine=run.engine,
            world=run.world,
            requests=run.requests,
        )
        run.report(step, loss=loss, lr=rate, grad_norm=norm, seconds=time.perf_counter() - started)
        if state.skipped >= MAX_SKIPPED:
            raise NotFinite(
                f"{state.skipped} updates in a row were not finite, the last one in step {step} "
                f"(loss {loss}, gradient norm {norm})"
            )
        if any(requested):
            run.answer(requested)


def warm_up_ddp(state: TrainState, batch: Batch, engine: Engine) -> None:
    """Go forward and backward once and forget the gradients.

    DDP sends gradients in the order of the first backward pass, but only from the second on, and
    floating-point sums depend on their order; after this, every update, also the first after
    resuming, adds up alike.
    """
    with engine.autocast():
        _, loss = state.forward(**engine.move(batch))
    loss.backward()
    state.optimizer.zero_grad(set_to_none=True)
