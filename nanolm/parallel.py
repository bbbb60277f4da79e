"""Processes: how many train together, and what they tell each other.

torchrun starts one process for each GPU (or a few on a CPU), and says to each which one it is.
All hold the same model. An update's micro-batches are dealt out among them; each adds up the
gradients of its own, and the sum over all processes is what every one of them applies: so the
models stay the same without ever being compared (data parallelism; Li et al. 2020, PyTorch
Distributed).

Only process 0 reads and writes the folder of the run, and speaks; the others get from it what they
need to know, and what makes one of them leave makes all of them leave.
"""

import os
import signal
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nanolm.precision import Engine
from nanolm.system.signals import SIGNALS, STOP, Stopped, answered_by

# What carries tensors on a CPU, on a GPU. Objects and sums for the log always go from CPU to CPU.
BACKENDS = {"nccl": "cpu:gloo,cuda:nccl", "gloo": "gloo"}


class Shared(ValueError):
    """An error that all processes raise together: process 0 says it, the others are silent."""


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

    def tell(self, loss: Tensor, came: Collection[int]) -> Tensor:
        """The sum of loss over all processes, and how many have got each signal.

        (1 + signals,), on the device of loss: the one small message of an update. Whether to apply
        the update needs no other: a loss that is not finite shows in the sum, and the gradients
        are the same everywhere.
        """
        flags = [torch.full_like(loss, float(number in came)) for number in SIGNALS]
        message = torch.stack((loss, *flags))  # filled on the device: a copy to it would wait
        if self.size > 1:
            dist.all_reduce(message)
        return message

    def add_up(self, *numbers: float) -> list[float]:
        """The sum of each number over all processes."""
        sums = torch.tensor(numbers, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(sums)
        return sums.tolist()

    def heed(self, noted: Collection[int]) -> None:
        """Raise Stopped in all processes where any of them has noted a signal to stop."""
        came = self.add_up(*(float(number in noted) for number in STOP))
        if any(came):
            raise Stopped(next(number for number, n in zip(STOP, came, strict=True) if n))

    @contextmanager
    def united(self) -> Iterator[None]:
        """A block of all processes: what is wrong in one of them is raised by all, as Shared."""
        if self.size == 1:
            yield
            return
        problem = None
        try:
            yield
        except (ValueError, OSError) as error:
            problem = str(error)
        problems = [None] * self.size
        dist.all_gather_object(problems, problem)
        for rank, problem in enumerate(problems):
            if problem is not None:
                raise Shared(problem + f" (says process {rank})" * (rank > 0))

    def from_first(self, function: Callable[[], Any]) -> Any:
        """What function gives or raises in process 0, given or raised in all."""
        value = [None]
        with self.united():
            if self.leads:
                value[0] = function()
        if self.size > 1:
            dist.broadcast_object_list(value)
        return value[0]

    def one_by_one(self, function: Callable[[], Any]) -> Any:
        """function() of each process; first in process 0, then in the first of each machine.

        For what those then make for the others, on a disk that machines may share or not.
        """
        mine = 0 if self.leads else 1 if self.local_rank == 0 else 2
        for turn in range(3):
            with self.united():
                if turn == mine:
                    value = function()
        return value

    def own_gpu(self, engine: Engine) -> Engine:
        """The engine of this process: of several on a machine, each has a GPU of its own."""
        if self.size == 1 or engine.device == "cpu":
            return engine
        if engine.device != "cuda":
            raise ValueError(
                f"device={engine.device!r} is for one process; {self.size} were started: choose "
                "auto, cpu or cuda"
            )
        n = torch.cuda.device_count()
        if self.local_rank >= n:
            raise ValueError(
                f"process {self.local_rank} of this machine has no GPU: there are {n}; start with "
                f"--nproc_per_node={n}"
            )
        torch.cuda.set_device(self.local_rank)
        return replace(engine, device=f"cuda:{self.local_rank}")


ALONE = World()

# ------------------------------------------------------------------------------------------
# Meeting the others


def find_world() -> World:
    """Which process this is, from the variables that torchrun sets."""
    names = {
        "rank": "RANK",
        "size": "WORLD_SIZE",
        "local_rank": "LOCAL_RANK",
        "restarts": "TORCHELASTIC_RESTART_COUNT",
    }
    if "WORLD_SIZE" not in os.environ:
        return ALONE
    given = {key: os.environ[name] for key, name in names.items() if name in os.environ}
    for key, value in given.items():
        if not value.isdecimal():
            raise ValueError(f"{names[key]}={value!r}: a whole number, as torchrun sets it")
    if int(given.get("rank", 0)) >= int(given["size"]):
        raise ValueError(
            f"RANK={given.get('rank', 0)}, WORLD_SIZE={given['size']}: processes are numbered "
            "from 0, as torchrun does"
        )
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")  # not always chosen; so also its process
    launch = f"{run_id} of process {os.getppid()}" if run_id else ""
    return World(**{key: int(value) for key, value in given.items()}, launch=launch)


def choose_backend(backend: str) -> str:
    """What carries the gradients: nccl where there are GPUs, else gloo.

    Raises ValueError where nccl has no GPU.
    """
    if backend == "auto":
        return "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl" and not torch.cuda.is_available():
        raise ValueError("backend='nccl': PyTorch sees no NVIDIA GPU here; use --backend=auto")
    return backend


def meet(world: World, backend: str) -> None:
    """Let torch.distributed connect all processes; their addresses are in a store of torchrun's.

    The store outlives a restart, and the addresses in it. Each life writes under its own number;
    not where there are several machines, each of which counts its own restarts.
    """
    try:
        with answered_by(signal.SIG_DFL, STOP):  # it waits without Python
            store, rank, size = next(dist.rendezvous("env://"))
            if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
                store = dist.PrefixStore(f"life {world.restarts}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the processes cannot meet ({reason}): start them by torchrun") from None


@contextmanager
def joined(backend: str) -> Iterator[World]:
    """Meet the other processes of the run, and stay with them for the block.

    Raises Shared where another one is lost on the way.
    """
    world = find_world()
    if world.size == 1:
        yield world
        return
    backend = BACKENDS[choose_backend(backend)]
    try:
        meet(world, backend)
        yield world
    except (Shared, Stopped):  # of all; who leaves alone would wait here for the others
        with answered_by(lambda *_: None, STOP):  # torchrun may send a second one
            if dist.is_initialized():
                dist.destroy_process_group()
        raise
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise Shared("another process of this run has ended; what it says tells why") from None
        raise
    except Exception as error:
        error.add_note(f"process {world.rank}")
        raise
    dist.destroy_process_group()
