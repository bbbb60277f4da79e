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

import torch
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
            # Who lets go of the group last waits for gloo's thread; these would do so while they
            # hold Python's lock, which that thread may wait for.
            del ddp.logger, ddp.reducer

    def sum_up(self, loss: Tensor, flags: list[bool]) -> Tensor:
        """The sum of loss over all processes, and how many have raised each flag.

        (1 + flags,), on the device of loss: the one small message of an update. Whether to apply
        the update needs no other: a loss that is not finite shows in the sum, and the gradients
        are the same everywhere.
        """
        raised = [torch.full_like(loss, float(flag)) for flag in flags]
        message = torch.stack((loss, *raised))  # filled on the device: a copy to it would wait
        if self.size > 1:
            dist.all_reduce(message)
        return message

    def add_up(self, *numbers: float) -> list[float]:
        """The sum of each number over all processes."""
        sums = torch.tensor(numbers, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(sums)
        return sums.tolist()


ALONE = World()
