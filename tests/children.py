"""Child processes for tests that stop, kill and connect runs.

Starting Python and importing torch takes seconds; these are forked in hundredths of a second, from
a server that has imported torch and computed nothing (so that no thread of it holds a lock).
"""

import contextlib
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from conftest import ROOT

from nanolm.runs import pictures
from nanolm.runs.settings import TrainConfig
from nanolm.system.script import run_script

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(
    ["torch", "torch._dynamo", "nanolm.runs.start", "hypothesis", "pytest"]
)


def start(
    function: Callable, *arguments: object, log: str = "log.txt", environment: dict | None = None
) -> multiprocessing.Process:
    """Start a child in the current folder that calls the function; all it prints goes to log."""
    everything = (Path.cwd(), log, environment or {}, function, arguments)
    child = FORK.Process(target=begin, args=everything, daemon=True)
    with contextlib.chdir(ROOT):  # the server, which this may start, is to find nanolm
        child.start()
    return child


def begin(place: Path, log: str, environment: dict, function: Callable, arguments: tuple) -> None:
    os.chdir(place)
    os.environ.update(environment)
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, encoding="utf-8") for n in (1, 2))
    torch.set_num_threads(1)
    pictures.draw_losses = lambda *_, **__: False  # drawing takes longer than these runs
    function(*arguments)


def free_port() -> int:
    """The number of a port of this machine that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_ranks(n: int, function: Callable, *arguments: object) -> list[multiprocessing.Process]:
    """Start n children that find each other as those of torchrun do; they print to log0.txt ..."""
    port = free_port()
    return [
        start(
            function,
            *arguments,
            log=f"log{rank}.txt",
            environment={
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": str(n),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            },
        )
        for rank in range(n)
    ]


def end(*children: multiprocessing.Process, timeout: float = 60) -> list[int]:
    """Wait for the children; their exit codes, minus the signal's number for those killed by one.

    Kills those that take longer, and fails.
    """
    for child in children:
        child.join(timeout)
    late = [child for child in children if child.exitcode is None]
    for child in late:
        child.kill()
        child.join()
    assert not late, f"{len(late)} children did not end in {timeout} s"
    return [child.exitcode for child in children]


def run_train(*arguments: str) -> None:
    """Do in this process what `python train.py` does; ends it with an exit code."""
    import train

    sys.argv = ["train.py", *arguments]
    run_script(train.main, "", TrainConfig, several=True)


def as_torchrun_does(child: Callable, *arguments: str) -> None:
    """Call the child in a process that knows, before it meets them, that a first one speaks."""
    os.environ["TORCHELASTIC_RUN_ID"] = "x"
    child(*arguments)
