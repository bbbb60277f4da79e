"""The loss: how surprised a model is by the tokens that came.

A model ends in a product: the last vector x of each position with the embedding of each of the V
tokens. These scores, the logits z = W x, are log probabilities up to a constant, and the loss is
the mean surprise at the targets (cross-entropy):

    loss = mean over positions of  log(sum_j exp z_j) - z_target

With label smoothing (Szegedy et al. 2016, section 7) a part e of each target is spread over all
tokens, so that no logit has to grow without bound: z_target becomes (1 - e) z_target + e mean z.

With a vocabulary of tens of thousands the logits are by far the largest tensor of training, and
their gradient is one more. But that gradient is known as soon as they are, softmax(z) with 1 taken
off at the target; so a chunk of positions can be finished, forward and backward, before the next
one begins, and only the gradients of x and W, which are needed in any case, outlive it.

Where W is split among processes by rows (see parallel.py), each of them computes the logits of its
own tokens alone. What they must tell each other is small: how much all logits of a position add up
to, the loss, and the gradient of x (Shoeybi et al. 2019, Megatron-LM, section 3).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

NO_TARGET = -1  # a target where there is no loss

# So many logits at a time; two or three tensors of this size exist at once. On a CPU the gradient
# of GPT-2's W is larger already; a GPU wants more work at once.
CHUNK = {"cpu": 6_000_000, "cuda": 120_000_000}


def cross_entropy(logits: Tensor, targets: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Mean of -log softmax(logits)[target] over targets that are not -1; 0 where there is none.

    logits: (B, T, V), of any precision: the softmax is computed in at least fp32. targets: (B, T).
    smoothing: the part of each target that is spread over all tokens.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    total = F.cross_entropy(
        logits.flatten(0, 1),
        targets.flatten(),
        ignore_index=NO_TARGET,
        reduction="sum",
        label_smoothing=smoothing,
    )
    return total / (targets != NO_TARGET).sum().clamp(min=1)


def projected_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk: int | None = None,
    *,
    bias: Tensor | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """cross_entropy(x @ weight.T + bias, targets), computed chunk logits at a time (>= a row).

    x: (B, T, C); weight: (V, C); targets: (B, T); bias: (V,). Where all logits fit into one chunk,
    they are simply computed; and in float16, whose gradients need the loss scaled up before they
    are made. weight and bias may be DTensors, which are split by rows or whole in each process.
    """
    group, n_tokens = None, len(weight)
    if hasattr(weight, "to_local"):
        group = weight.device_mesh.get_group() if weight.placements[0].is_shard() else None
        weight, bias = weight.to_local(), None if bias is None else bias.to_local()
    chunk = chunk or CHUNK.get(x.device.type, CHUNK["cpu"])
    fits = targets.numel() * len(weight) <= chunk
    if group is None and (fits or product_dtype(x) == torch.float16):
        return cross_entropy(F.linear(x, weight, bias), targets, smoothing=smoothing)
    if bias is not None:  # as the weights of one more channel, which is always 1
        x = torch.cat((x, torch.ones_like(x[..., :1])), dim=-1)
        weight = torch.cat((weight, bias[:, None]), dim=1)
    if not torch.is_grad_enabled():
        x, weight = x.detach(), weight.detach()  # asks for no gradients
    most = len(weight) if group is None else -(-n_tokens // group.size())  # alike in all of them
    rows = max(1, chunk // most)
    options = rows, smoothing, n_tokens, group
    return ChunkedCrossEntropy.apply(x.flatten(0, 1), weight, targets.flatten(), *options)


def product_dtype(x: Tensor) -> torch.dtype:
    """The precision of matrix products with x, here and now."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class ChunkedCrossEntropy(torch.autograd.Function):
    """The loss of x (N, C) with its gradients, computed together, a few rows at a time."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, targets: Tensor, *options: Any
    ) -> Tensor:
        """x: (N, C); weight: (V, C); targets: (N,).

        options: how many of the N at a time; smoothing; V, and the processes that split the rows
        of weight, in order (None: this one has them all).
        """
        rows, smoothing, n_tokens, group = options
        first = 0 if group is None else group.rank() * -(-n_tokens // group.size())
        narrow = product_dtype(x)
        matrix, count = weight.to(narrow), (targets != NO_TARGET).sum().clamp(min=1)
        total = torch.zeros((), device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, len(x), rows):
            chunk = slice(start, start + rows)
            inputs, target = x[chunk].to(narrow), targets[chunk]
            log_p = log_softmax((inputs @ matrix.T).to(total.dtype), group)
            counts, own = target != NO_TARGET, target - first  # own: those among these rows
            own = own.where(counts & (own >= 0) & (own < len(weight)), NO_TARGET)
            losses = F.nll_loss(log_p, own, ignore_index=NO_TARGET, reduction="sum")
            spread = log_p[counts].sum() / n_tokens if smoothing else 0.0
            total += (1 - smoothing) * losses - smoothing * spread
            if dx is None and dweight is None:
                continue
            d = log_p.exp_()  # (rows, V): softmax(z), then minus 1 at the target
            if smoothing:
                d -= smoothing / n_tokens
            hits = (own != NO_TARGET).to(d.dtype) * (1 - smoothing)
            d[torch.arange(len(d), device=d.device), own.clamp(min=0)] -= hits
            d = d.mul_((counts.to(d.dtype) / count)[:, None]).to(narrow)
            if dx is not None:
                dx[chunk] = d @ matrix
            if dweight is not None and narrow == dweight.dtype:
                dweight.addmm_(d.T, inputs)
            elif dweight is not None:
                dweight += d.T @ inputs
        if group is not None:
            dist.all_reduce(total, group=group)
            if dx is not None:
                dist.all_reduce(dx, group=group)
        ctx.save_for_backward(dx, dweight)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d: Tensor) -> tuple[Tensor | None, ...]:
        """d: the gradient of the loss, a number."""
        # In place, since the second is large; a second backward pass finds that out and raises.
        dx, dweight = (None if saved is None else saved.mul_(d) for saved in ctx.saved_tensors)
        return dx, dweight, None, None, None, None, None


def log_softmax(logits: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """log softmax of rows, (N, V), that may go on in the other processes of the group."""
    if group is None:
        return F.log_softmax(logits, dim=-1)
    own = logits.logsumexp(dim=-1)
    sums = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(sums, own, group=group)
    return logits - torch.stack(sums).logsumexp(dim=0)[:, None]
