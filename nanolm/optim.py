"""Optimizers, and the learning rate as a pure function of the step.

The gradient g of a batch says which way the loss falls; an optimizer says how far to go:

    SGD     w = w - lr * m,  m = beta m + g + weight_decay * w
    AdamW   w = w - lr * (a + weight_decay * w)
    LAMB    w = w - lr * |w| u / |u|,  u = a + weight_decay * w
    Muon    W = W - lr * (0.2 sqrt(max(rows, columns)) * U V^T + weight_decay * W)

a is Adam's direction m_hat / (sqrt(v_hat) + eps), from running means m of g and v of g^2, freed of
the zeros they began with: about 1 for every weight, whatever the scale of its gradient. U V^T is
the running mean of a matrix's gradients, U S V^T, with all its singular values made 1. Few of them
are large, so that other optimizers hardly move in the other directions; Muon (Jordan et al. 2024)
goes equally far in each.

The rate rises linearly at first, since the running means know nothing yet, and falls towards the
end, so that the noise of the batches averages out.

A parameter may be a DTensor, of which each of several processes holds a part (see parallel.py).
All but Muon act on each number by itself, or on a sum; Muon asks for whole matrices.
"""

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn


def parameter_groups(
    model: nn.Module, weight_decay: float, optimizer: str = "adamw"
) -> list[dict]:
    """Two groups: matrices, which decay, and vectors (biases and norm weights), which do not.

    For Muon the hidden matrices are a third one: all but the embeddings, which are tables and no
    maps from vectors to vectors, and those of model.head, whose outputs are no hidden channels.
    """
    outer = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    outer = {p for module in (*outer, model.head) for p in module.parameters()}
    vectors, matrices, hidden = [], [], []
    for p in model.parameters():
        if p.dim() < 2:
            vectors.append(p)
        elif optimizer == "muon" and p not in outer:
            hidden.append(p)
        else:
            matrices.append(p)
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
        {"params": hidden, "weight_decay": weight_decay, "hidden": True},
    ]
    return groups if hidden else groups[:2]


def has_fused_kernel(groups: list[dict]) -> bool:
    """Whether PyTorch updates all parameters of this device in one kernel."""
    return groups[0]["params"][0].device.type in ("cpu", "cuda")


def adamw(groups: list[dict], *, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2, but that lr multiplies the decay, too)."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=has_fused_kernel(groups))


def sgd(groups: list[dict], *, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum betas[0] (Sutskever et al. 2013, eq. 1)."""
    fused = has_fused_kernel(groups) and not in_parts(groups[0]["params"][0])  # has no such kernel
    return torch.optim.SGD(groups, lr=lr, momentum=betas[0], fused=fused)


def adam_direction(p: Tensor, memory: dict, betas: tuple[float, float]) -> Tensor:
    """m_hat / (sqrt(v_hat) + eps) of a parameter (Kingma & Ba 2015, algorithm 1)."""
    if not memory:
        memory |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    memory["step"] += 1
    m = memory["exp_avg"].lerp_(p.grad, 1 - betas[0])
    v = memory["exp_avg_sq"].lerp_(p.grad.square(), 1 - betas[1])
    m_hat = m / (1 - betas[0] ** memory["step"])
    v_hat = v / (1 - betas[1] ** memory["step"])
    return m_hat / (v_hat.sqrt() + 1e-8)


class Lamb(torch.optim.Optimizer):
    """AdamW's step, scaled to the length of the tensor (You et al. 2020, algorithm 2, phi(x) = x).

    Made for very large batches: each tensor moves by the fraction lr of its length, and one of
    zeros by lr times the direction.
    """

    def __init__(self, groups: list[dict], *, lr: float, betas: tuple[float, float]):
        super().__init__(groups, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self) -> None:
        """Make one update from the gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                u = adam_direction(p, self.state[p], group["betas"]) + group["weight_decay"] * p
                trust = p.norm() / u.norm()
                u *= torch.where((trust > 0) & trust.isfinite(), trust, 1.0)
                p.sub_(u, alpha=group["lr"])


class Muon(torch.optim.Optimizer):
    """Orthogonal steps for the hidden matrices (Jordan et al. 2024), AdamW for the rest.

    betas[0] is the momentum of both. Each step of a matrix has the length that AdamW's usually
    has, so that one learning rate serves all (Liu et al. 2025, eq. 4). Matrices of one shape, also
    turned, are stacked: a GPU then has enough to do, at the price of a few copies of them.
    """

    def __init__(self, groups: list[dict], *, lr: float, betas: tuple[float, float]):
        super().__init__(groups, {"lr": lr, "betas": betas, "hidden": False})

    @torch.no_grad()
    def step(self) -> None:
        """Make one update from the gradients."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            lr, betas = group["lr"], group["betas"]
            for p in parameters:
                p.mul_(1 - lr * group["weight_decay"])
            if group["hidden"]:
                self.step_hidden(parameters, lr, betas[0])
            else:
                for p in parameters:
                    p.sub_(adam_direction(p, self.state[p], betas), alpha=lr)

    def step_hidden(self, matrices: list[Tensor], lr: float, beta: float) -> None:
        """One step of the hidden matrices."""
        batches = defaultdict(list)
        for i, p in enumerate(matrices):
            # those in parts are put together alone, so that only one is whole at a time
            batches[wide(p).shape, i * in_parts(p)].append(p)
        for (shape, _), batch in batches.items():
            momenta = [wide(whole(self.momentum(p, beta))) for p in batch]
            for p, direction in zip(batch, orthogonalize(torch.stack(momenta)), strict=True):
                step = direction if wide(p).shape == p.shape else direction.mT
                p.sub_(part_of(step, p), alpha=lr * 0.2 * math.sqrt(max(shape)))

    def momentum(self, p: Tensor, beta: float) -> Tensor:
        """The running mean of the gradient, looked at one step ahead (Nesterov)."""
        memory = self.state[p]
        if not memory:
            memory["momentum_buffer"] = torch.zeros_like(p)
        m = memory["momentum_buffer"].lerp_(p.grad, 1 - beta)
        return p.grad.lerp(m, beta)


def in_parts(tensor: Any) -> bool:
    """Whether it is a DTensor: each process holds only a part."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which each process holds a part. All of them must ask for it."""
    return tensor.full_tensor() if in_parts(tensor) else tensor


def part_of(values: Tensor, own: Tensor) -> Tensor:
    """What this process holds of values, a whole tensor, if it holds own of one of that shape."""
    if not in_parts(own) or getattr(values, "shape", ()) != own.shape:
        return values
    from torch.distributed.tensor import distribute_tensor  # takes time, and is seldom needed

    return distribute_tensor(values, own.device_mesh, own.placements, src_data_rank=None)


def wide(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose where that is the wider one."""
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """About U V^T for each matrix U S V^T: (n, rows, columns), rows <= columns.

    A polynomial a x + b x^3 + c x^5 of a matrix is made of matrix products, and acts on its
    singular values alone. This one (Jordan et al. 2024) takes those from 0.002 to 1 to between
    0.68 and 1.14 in five steps; smaller ones grow to 3.4 times their size in each.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    length = matrices.norm(dim=(1, 2), keepdim=True)
    x = matrices / length.clamp(min=1e-7)  # a gradient may be 0
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


OPTIMIZERS = {"adamw": adamw, "muon": Muon, "lamb": Lamb, "sgd": sgd}


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


def inverse_sqrt(step: int, *, warmup_iters: int, decay_iters: int, cooldown_iters: int) -> float:
    """1 / sqrt(step), scaled to be 1 where the warm-up ends (Vaswani et al. 2017, eq. 3).

    It knows no end, and is far above the floor when decay_iters cuts it off.
    """
    return math.sqrt((warmup_iters + 1) / (step + 1))


SCHEDULES = {"cosine": cosine, "trapezoid": trapezoid, "inverse_sqrt": inverse_sqrt}


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

    A linear warm-up over warmup_iters updates, on a line that is 0 one step before the first of
    them and peak one after the last; then what SCHEDULES[schedule] says is left of the way from
    peak down to floor, which is reached at decay_iters and kept.
    """
    if step < warmup_iters:
        return peak * (step + 1) / (warmup_iters + 1)
    if step >= decay_iters:
        return floor
    left = SCHEDULES[schedule](
        step, warmup_iters=warmup_iters, decay_iters=decay_iters, cooldown_iters=cooldown_iters
    )
    return floor + left * (peak - floor)
