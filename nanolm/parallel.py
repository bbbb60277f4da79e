"""Processes: many of them, one run.

torchrun starts one process for each GPU (or a few on a CPU), and says to each which one it is.
All hold the same model. An update's micro-batches are dealt out among them; each adds up the
gradients of its own, and the sum over all processes is what every one of them applies: so the
models stay the same without ever being compared (data parallelism; Li et al. 2020, PyTorch
Distributed).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them; alone unless told otherwise."""

    rank: int = 0  # which one this is
    size: int = 1  # how many there are
    local_rank: int = 0  # which one this is on its machine
    restarts: int = 0  # how often torchrun has started all of them again
    launch: str = ""  # the same through all restarts, and another for another torchrun

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @contextmanager
    def sharing_gradients(self, forward: nn.Module) -> Iterator[nn.Module]:
        """forward, with its parameters' gradients averaged over all processes by each backward."""
        if self.size == 1:
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
        """
        if self.size > 1:
            forward.require_backward_grad_sync = sync

    def all_reduce(self, numbers: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in its place."""
        if self.size > 1:
            dist.all_reduce(numbers)
        return numbers


ALONE = World()
