"""The life of the processes of a run: how they meet, agree, fail and part.

Only process 0 reads and writes the folder of the run, and speaks; the others get from it what they
need to know, and what makes one of them leave makes all of them leave.
"""

import atexit
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from nanolm.parallel import ALONE, World
from nanolm.precision import Engine
from nanolm.system.signals import STOP, Stopped, handled_by
from nanolm.training import NotFinite

# What carries tensors on a CPU, on a GPU. Objects and sums for the log always go from CPU to CPU.
BACKENDS = {"nccl": "cpu:gloo,cuda:nccl", "gloo": "gloo"}


class Shared(ValueError):
    """An error that all processes raise together: process 0 says it, the others are silent."""


# ------------------------------------------------------------------------------------------
# Agreeing


@contextmanager
def all_or_none(world: World) -> Iterator[None]:
    """A block that all processes pass or none: what one raises, all raise, as Shared."""
    if world.size == 1:
        yield
        return
    problem = None
    try:
        yield
    except (ValueError, OSError) as error:
        problem = str(error)
    problems = [None] * world.size
    dist.all_gather_object(problems, problem)
    for rank, problem in enumerate(problems):
        if problem is not None:
            raise Shared(f"{problem} (says process {rank})" if rank else problem)


def broadcast(world: World, function: Callable[[], Any]) -> Any:
    """What function gives or raises in process 0, given or raised in all."""
    value = [None]
    with all_or_none(world):
        if world.leads:
            value[0] = function()
    if world.size > 1:
        dist.broadcast_object_list(value)
    return value[0]


def any_of(world: World, flags: list[bool]) -> list[bool]:
    """For each flag, whether any process has raised it."""
    return (world.all_reduce(torch.tensor(flags, dtype=torch.float64)) > 0).tolist()


def own_gpu(world: World, engine: Engine) -> Engine:
    """The engine of this process: of several on a machine, each has a GPU of its own."""
    if world.size == 1 or engine.device == "cpu":
        return engine
    if engine.device != "cuda":
        raise ValueError(
            f"device={engine.device!r} is for one process; {world.size} were started: choose "
            "auto, cpu or cuda"
        )
    n = torch.cuda.device_count()
    if world.local_rank >= n:
        raise ValueError(
            f"process {world.local_rank} of this machine has no GPU: there are {n}; start with "
            f"--nproc_per_node={n}"
        )
    torch.cuda.set_device(world.local_rank)
    return replace(engine, device=f"cuda:{world.local_rank}")


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
        with handled_by(signal.SIG_DFL, STOP):  # it waits without Python
            store, rank, size = next(dist.rendezvous("env://"))
            if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
                store = dist.PrefixStore(f"life {world.restarts}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the processes cannot meet ({reason}): start them by torchrun; or, if this is to be "
            "the only one, unset RANK and WORLD_SIZE"
        ) from None


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
    except (Shared, NotFinite, Stopped) as error:  # of all; else this would wait for the others
        part()
        error.shared = True
        raise
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            atexit.register(end_at_once)
            raise Shared("another process of this run has ended; what it says tells why") from None
        raise
    except Exception as error:
        error.add_note(f"process {world.rank}")
        raise
    part()


def part() -> None:
    """Leave the others; a second signal, which torchrun may send, does not disturb this."""
    with handled_by(lambda *_: None, STOP):
        if dist.is_initialized():
            dist.destroy_process_group()


def end_at_once() -> None:
    """End this process as an error does, without waiting for the threads of gloo.

    They cannot be joined once another process is lost, and one that asks for the GIL while Python
    ends aborts the process ("terminate called without an active exception").
    """
    sys.stdout.flush()
    os._exit(2)
