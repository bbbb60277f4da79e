"""Work on several cores, results in order and in bounded memory; and a bar while it lasts.

The work is done by threads: what takes the time here (tiktoken, hashes, files) lets go of Python's
lock while it runs.
"""

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm import tqdm


def in_order(function: Callable[[Any], Any], items: Iterable) -> Iterator[Any]:
    """function(item) for each item, in their order, by a thread for each core.

    Items are taken as they are needed, two for each thread ahead. Raises what function raises.
    """
    n, pending = n_cores(), deque()
    with ThreadPoolExecutor(n) as threads:
        for item in items:
            pending.append(threads.submit(function, item))
            if len(pending) > 2 * n:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def n_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def progress(**options: Any) -> tqdm:
    """A bar for long work: only on a terminal, and after a second."""
    return tqdm(**options, delay=1, disable=True if sys.stderr is None else None)
