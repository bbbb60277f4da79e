"""Processes: many of them, one run.

torchrun starts one process for each GPU (or a few on a CPU), and says to each which one it is.
The micro-batches of an update are dealt out among them, and what they learn from these is summed.
There are three ways to hold the weights meanwhile. Of a matrix with four parts, the processes 0,
1, ... hold:

    whole            replicas         shards           split matrices     shards of these
                     0      1         0      1         0      1           0     1     2     3
    a b              a b    a b       a b              a        b         a       b
    c d              c d    c d              c d       c        d                     c       d

Replicas (data parallelism; Li et al. 2020, PyTorch Distributed) are the same model everywhere:
each process adds up the gradients of its own micro-batches, and all apply the sum over all
processes, so that the models stay the same without ever being compared.

Shards (ZeRO: Rajbhandari et al. 2020; Zhao et al. 2023, PyTorch FSDP) are parts in which weights,
gradients and the optimizer's memory are only kept. For its pass through a block, forward or
backward, each process gathers all of the block, and then lets go of it; of the gradients it gets
the sum for its own part.

Matrices are split (tensor parallelism; Shoeybi et al. 2019, Megatron-LM, section 3) so that each
process multiplies by its own part alone. All processes that split a matrix see the same
micro-batch. Of two products in a row the first is split by columns, the second by rows: then
nothing has to be exchanged in between, and the results add up (see split_product). In attention
the columns are heads, and in the table of tokens the rows are tokens.

All of this is done to a finished model, from outside (see parts.py): it does not know of it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from nanolm.optim import in_parts, whole


def split_product(
    x: np.ndarray, first: np.ndarray, second: np.ndarray, between: Callable, n: int
) -> np.ndarray:
    """between(x @ first) @ second, as n processes compute it that each hold a part of both.

    x: (T, C); first: (C, H); second: (H, C). between acts on each of the H channels by itself.
    """
    columns, rows = np.split(first, n, axis=1), np.split(second, n, axis=0)
    partial = [between(x @ own) @ rows[i] for i, own in enumerate(columns)]  # one per process
    return np.sum(partial, axis=0)  # the only thing that they exchange


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them; alone unless told otherwise."""

    rank: int = 0  # which one this is
    size: int = 1  # how many there are
    local_rank: int = 0  # which one this is on its machine
    restarts: int = 0  # how often torchrun has started all of them again
    launch: str = ""  # the same through all restarts, and another for another torchrun
    shard: bool = False  # whether each keeps only a part of the weights
    tensor: int = 1  # how many of them split each matrix

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @property
    def replicas(self) -> int:
        """How many of them have micro-batches of their own."""
        return self.size // self.tensor

    @property
    def replica(self) -> int:
        """Which of these this is."""
        return self.rank // self.tensor

    @property
    def splits(self) -> bool:
        """Whether each process holds only a part of the model."""
        return self.tensor > 1 or (self.shard and self.size > 1)

    @property
    def replicates(self) -> bool:
        """Whether each of several processes holds the whole model, which DDP keeps alike."""
        return self.size > 1 and not self.splits

    @contextmanager
    def sharing_gradients(self, forward: nn.Module) -> Iterator[nn.Module]:
        """forward, with its parameters' gradients averaged over all replicas by each backward."""
        if not self.replicates:
            yield forward
            return
        ddp = DistributedDataParallel(
            forward, forward_sync_buffers=False, gradient_as_bucket_view=True
        )
        try:
            yield ddp
        finally:
            # Destroying these while holding the GIL can deadlock with gloo's thread.
            del ddp.logger, ddp.reducer

    def sync_gradients(self, forward: nn.Module, sync: bool) -> None:
        """Say whether the next backward pass exchanges gradients, or only adds up this process's.

        The last micro-batch of an update exchanges them for all. (DDP's no_sync sets the same.)
        Not so of shards: a process would have to keep the gradients of the whole model until then.
        """
        if self.replicates:
            forward.require_backward_grad_sync = sync

    def all_reduce(self, numbers: Tensor) -> Tensor:
        """The sum of a tensor over all replicas, in its place."""
        if self.size > 1:
            dist.all_reduce(numbers)
        return numbers.div_(self.tensor) if self.tensor > 1 else numbers

    def broadcast(self, value: Any) -> Any:
        """The value of process 0, if it is a tensor: on the CPU; others only say its shape."""
        if self.size > 1 and isinstance(value, Tensor):
            value = value if self.leads else torch.empty_like(value, device="cpu")
            dist.broadcast(value, src=0)
        return value


ALONE = World()


@contextmanager
def without_weights() -> Iterator[None]:
    """A block in which layers get shapes, but no memory; as many random numbers are drawn."""

    def forget(parent: nn.Module, name: str, layer: nn.Module | None) -> None:
        if layer is not None and not any(layer.children()):
            layer.to("meta")

    handle = register_module_module_registration_hook(forget)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def gathered(content: Any, world: World) -> Any:
    """A content with its DTensors whole, on the CPU of process 0; None for each in the others.

    All must ask for it. They come one after the other, so that no other process ever holds all.
    """
    if isinstance(content, dict):
        return {key: gathered(part, world) for key, part in content.items()}
    if not in_parts(content):
        return content
    tensor = whole(content)
    return tensor.cpu() if world.leads else None
