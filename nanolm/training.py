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
run that never stopped.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from nanolm.engine import Engine
from nanolm.model import GPT

Batch = tuple[np.ndarray, np.ndarray]  # ids and targets, (B, T) each
MAX_SKIPPED = 3  # non-finite updates in a row before a run gives up


@dataclass
class TrainState:
    """All that training changes."""

    model: GPT
    forward: Callable  # what training calls: the model itself, or the model compiled
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # scales fp16 losses, so that small gradients do not vanish
    step: int = 0  # updates made
    best_val_loss: float = math.inf
    skipped: int = 0  # non-finite updates in a row, up to now

    def state_dict(self) -> dict:
        """The state as a checkpoint holds it."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "best_val_loss": self.best_val_loss,
            "skipped": self.skipped,
        }

    def load_state_dict(self, saved: dict) -> None:
        """Continue from what state_dict gave; the optimizer keeps its own decay and betas."""
        self.model.load_state_dict(saved["model"])
        groups = self.optimizer.param_groups
        options = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        self.optimizer.load_state_dict(saved["optimizer"])
        for group, mine in zip(self.optimizer.param_groups, options, strict=True):
            group.update(mine)
        self.scaler.load_state_dict(saved["scaler"])
        self.step, self.best_val_loss = saved["step"], saved["best_val_loss"]
        self.skipped = saved["skipped"]


def dropout_seed(seed: int, step: int, micro_step: int) -> int:
    """A 64-bit seed that differs for every micro-batch of every run."""
    return int(np.random.SeedSequence((seed, step, micro_step)).generate_state(1, np.uint64)[0])


def accumulate_gradients(
    state: TrainState, micro_batches: Iterable[Batch], engine: Engine, *, seed: int
) -> torch.Tensor:
    """Add the gradient of the update's mean loss to the parameters.

    Returns that loss, on the device.
    """
    micro_batches = list(micro_batches)
    n_targets = [int((targets != -1).sum()) for _, targets in micro_batches]
    loss = torch.zeros((), device=engine.device)
    for i, batch in enumerate(micro_batches):
        torch.manual_seed(dropout_seed(seed, state.step, i))
        ids, targets = engine.move(*batch)
        with engine.autocast():
            _, micro_loss = state.forward(ids, targets)
        share = micro_loss * (n_targets[i] / max(1, sum(n_targets)))
        state.scaler.scale(share).backward()
        loss += share.detach()
    return loss


def update(
    state: TrainState,
    micro_batches: Iterable[Batch],
    engine: Engine,
    *,
    learning_rate: float,
    grad_clip: float,
    seed: int,
) -> tuple[float, float]:
    """Make one update and count it. Returns its loss and the unclipped norm of its gradient.

    The gradient is scaled down to the norm grad_clip where it is longer (Pascanu et al. 2013); 0
    turns this off. A loss or gradient that is not finite is counted, but not applied.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    loss = accumulate_gradients(state, micro_batches, engine, seed=seed)
    state.scaler.unscale_(state.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), grad_clip or math.inf)
    loss, norm = torch.stack((loss, norm)).tolist()  # the one wait for a GPU in an update
    if math.isfinite(loss) and math.isfinite(norm):
        state.scaler.step(state.optimizer)
        state.skipped = 0
    elif not fp16_scale_is_settling(state, loss):
        state.skipped += 1
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    return loss, norm


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
) -> None:
    """The loop: update the state until it has made max_iters updates.

    micro_batches and learning_rate give the data and the rate of update number step, from 0.
    evaluate is called before the first update, after every eval_interval, and after the last;
    report after each update, with its numbers. Raises ValueError when several updates in a row are
    not finite.
    """
    state.model.train()
    if state.step == 0:
        evaluate()
    while state.step < max_iters:
        started, step = time.perf_counter(), state.step
        rate = learning_rate(step)
        loss, norm = update(
            state, micro_batches(step), engine, learning_rate=rate, grad_clip=grad_clip, seed=seed
        )
        report(step, loss=loss, lr=rate, grad_norm=norm, seconds=time.perf_counter() - started)
        if state.skipped >= MAX_SKIPPED:
            raise ValueError(
                f"{state.skipped} updates in a row were not finite, up to {step} (loss {loss}, "
                f"gradient norm {norm}); resume from the last checkpoint with a lower "
                "learning_rate, or with dtype=float32"
            )
        if state.step % eval_interval == 0 or state.step == max_iters:
            evaluate()
