"""Evaluation: how well a model predicts text it was not trained on.

The loss is the mean number of nats by which the model is surprised by each token. exp(loss) is the
perplexity: the size of a vocabulary over which a blind guess would be as good. Losses of models
with different tokenizers do not compare, since their tokens hold more or less text; bits per byte
do.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from nanolm.loss import NO_TARGET


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    batches: Iterable[dict[str, Tensor]],
    *,
    autocast: Callable[[], torch.autocast],
    add_up: Callable[..., list[float]] = lambda *numbers: list(numbers),
) -> float:
    """Mean loss over all targets that are not -1, in nats.

    batches: the arguments of forward, on the model's device; where several processes share
    them, those of this one, and add_up gives the sums of its arguments over all processes. Draws
    no random numbers, and puts the model back in the mode it was in. Raises ValueError where there
    is no target at all.
    """
    was_training = model.training
    model.eval()
    sums = []  # stay on the device: reading each one would make it wait
    for batch in batches:
        with autocast():
            _, loss = model(**batch)
        n = (batch["targets"] != NO_TARGET).sum()
        sums.append(torch.stack((loss * n, n)))
    model.train(was_training)
    sums = torch.stack(sums).tolist() if sums else [[0.0, 0.0]]
    total, count = add_up(*(math.fsum(column) for column in zip(*sums, strict=True)))
    if not count:
        raise ValueError("nothing to evaluate: no batch has a target")
    return total / count


def perplexity(loss: float) -> float:
    """exp of a loss in nats per token; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """A loss in nats per token as bits per byte of the text behind the tokens."""
    return loss / math.log(2) / bytes_per_token
