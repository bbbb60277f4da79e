"""Evaluation: how well a model predicts text it was not trained on.

The loss is the mean number of nats by which the model is surprised by each token. exp(loss) is the
perplexity: the size of a vocabulary over which a blind guess would be as good. Losses of models
with different tokenizers do not compare, since their tokens hold more or less text; bits per byte
do.

Whatever is measured is counted first: counts of batches, and of processes, add up.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from torch import Tensor

from nanolm.loss import NO_TARGET, cross_entropy


def loss_counts(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The sum of a batch's losses, in nats, and the number of its targets: (2,)."""
    _, loss = model(**batch)
    n = (batch["targets"] != NO_TARGET).sum()
    return torch.stack((loss * n, n))


def accuracy_counts(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The same two, and how often the likeliest token or label is the target: (3,)."""
    targets = batch["targets"]
    logits, _ = model(**{name: array for name, array in batch.items() if name != "targets"})
    n, hits = (targets != NO_TARGET).sum(), (logits.argmax(dim=-1) == targets).sum()
    return torch.stack((cross_entropy(logits, targets) * n, n, hits))


def mean_loss(counts: Tensor) -> float:
    """The loss in nats per target, from sums that begin with those of loss_counts.

    Raises ValueError without targets.
    """
    total, n = counts[:2].tolist()
    if not n:
        raise ValueError("nothing to evaluate: no batch has a target")
    return total / n


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    batches: Iterable[dict[str, Tensor]],
    *,
    tally: Callable[[torch.nn.Module, dict[str, Tensor]], Tensor] = loss_counts,
    autocast: Callable[[], torch.autocast] = nullcontext,
    all_reduce: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> Tensor:
    """The sums of what tally counts in each batch: float64, on the CPU.

    batches: the arguments of forward, on the model's device; where several processes share them,
    those of this one, and all_reduce sums over all. Draws no random numbers, and puts the model
    back in the mode it was in. Raises ValueError where there is no batch.
    """
    was_training = model.training
    model.eval()
    counts = []  # stay on the device: reading each one would make it wait
    for batch in batches:
        with autocast():
            counts.append(tally(model, batch))
    model.train(was_training)
    if not counts:
        raise ValueError("nothing to evaluate: there is no batch")
    return all_reduce(torch.stack(counts).cpu().double().sum(dim=0))


def perplexity(loss: float) -> float:
    """exp of a loss in nats per token; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """A loss in nats per token as bits per byte of the text behind the tokens."""
    return loss / math.log(2) / bytes_per_token
