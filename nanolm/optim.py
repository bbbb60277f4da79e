"""The optimizer, and the learning rate as a pure function of the step.

AdamW (Loshchilov & Hutter 2019, algorithm 2) keeps a running mean m of each gradient and v of its
square, and moves every weight by about the learning rate in the direction of m, whatever the scale
of its gradient; besides, it shrinks the weights by a fraction (weight decay):

    w = w - lr * (weight_decay * w + m_hat / (sqrt(v_hat) + eps))

The rate rises linearly at first (the running means know nothing yet), and falls towards the end,
so that the noise of the batches averages out.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices, which decay, and vectors (biases and norm weights), which do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def adamw(
    groups: Iterable[dict], *, lr: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """AdamW over the groups, in one fused kernel where the parameters' device has one."""
    groups = list(groups)
    device = groups[0]["params"][0].device.type
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=device in ("cpu", "cuda"))


OPTIMIZERS = {"adamw": adamw}


def cosine(step: int, *, warmup_iters: int, decay_iters: int, cooldown_iters: int) -> float:
    """How much of the way from floor to peak is left: half a cosine wave, from 1 to 0.

    For warmup_iters <= step < decay_iters (Loshchilov & Hutter 2017, eq. 5).
    """
    progress = (step - warmup_iters) / (decay_iters - warmup_iters)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def trapezoid(step: int, *, warmup_iters: int, decay_iters: int, cooldown_iters: int) -> float:
    """As cosine, but 1 until cooldown_iters before decay_iters, then a straight line to 0.

    Zhai et al. 2022; Hägele et al. 2024. The middle can be made longer without a new plan.
    """
    length = min(cooldown_iters, decay_iters - warmup_iters)
    return min(1.0, (decay_iters - step) / length)


SCHEDULES = {"cosine": cosine, "trapezoid": trapezoid}


def learning_rate(
    step: int,
    *,
    schedule: str,
    peak: float,
    floor: float,
    warmup_iters: int,
    decay_iters: int,
    cooldown_iters: int,
) -> float:
    """The learning rate of update number step, from 0: between floor and peak, or warming up.

    A linear warm-up over warmup_iters updates, never 0; then the schedule from peak down to floor,
    which is reached at decay_iters and kept.
    """
    if step < warmup_iters:
        return peak * (step + 1) / (warmup_iters + 1)
    if step >= decay_iters:
        return floor
    left = SCHEDULES[schedule](
        step, warmup_iters=warmup_iters, decay_iters=decay_iters, cooldown_iters=cooldown_iters
    )
    return floor + left * (peak - floor)
