"""A map over several processes: results in order, in bounded memory, and nobody left behind.

Python runs one thread at a time, so heavy work on text wants processes. Their number is the
caller's choice; what is only one item of work is done here, without starting any.
"""

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any

from tqdm import tqdm

from nanolm.system.signals import held_back

BUNDLE = 2**20  # characters of text that a process gets at once


def in_order(
    function: Callable[[Any], Any], items: Iterable, *, processes: int = 1
) -> Iterator[Any]:
    """function(item) for each item, in their order, by several processes.

    Items are taken as they are needed, a few ahead. function and items must pickle. (With more
    than one process, a script needs its `if __name__ == "__main__"`.) Raises what function raises,
    and ValueError where a process is killed.
    """
    items = iter(items)
    first = list(islice(items, 2))
    if processes <= 1 or len(first) < 2:
        yield from map(function, chain(first, items))
        return
    # A fresh interpreter for each ("spawn"): a fork would copy locks that other threads hold.
    pool = ProcessPoolExecutor(
        processes, get_context("spawn"), initializer=begin_work, initargs=(function,)
    )
    pending = deque()
    try:
        for item in chain(first, items):
            with held_back():
                pending.append(pool.submit(work, item))
            if len(pending) > 2 * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise ValueError(
            "a worker process has died, perhaps for want of memory: try again with --processes=1 "
            '(in a script of yours: processes=1, or all below `if __name__ == "__main__":`)'
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def begin_work(function: Callable[[Any], Any]) -> None:
    """Make a process ready: it knows its function, and ends with the process that started it."""
    global work_function
    work_function = function
    Thread(target=leave_with_parent, daemon=True).start()


def work(item: Any) -> Any:
    return work_function(item)


def leave_with_parent() -> None:
    parent_process().join()
    os._exit(1)


def n_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def bundles(items: Iterable, *, size: Callable[[Any], int] = len) -> Iterator[list]:
    """Items in lists of up to BUNDLE, as size measures them; a larger one is alone in its list."""
    bundle, total = [], 0
    for item in items:
        if bundle and total + size(item) > BUNDLE:
            yield bundle
            bundle, total = [], 0
        bundle.append(item)
        total += size(item)
    if bundle:
        yield bundle


def progress(**options: Any) -> tqdm:
    """A bar for long work: only on a terminal, and after a second."""
    return tqdm(**options, delay=1, disable=True if sys.stderr is None else None)
