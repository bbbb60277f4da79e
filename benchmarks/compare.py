"""Contests: the same work by several programs, in turns, on one machine, in one run.

Machines are busy and drift, so a time alone means little. The contestants take turns, each time is
the median of its turns, and what counts is the ratio.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repeats", type=int, default=3, help="turns of each contestant")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    return parser


def contest(
    work: str, contestants: Mapping[str, Callable[[], object]], *, repeats: int
) -> dict[str, float]:
    """Median seconds of each contestant; printed with the ratio to the first, which is ours."""
    seconds = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ours = next(iter(medians.values()))
    print(work)
    for name, median in medians.items():
        spread = f"{min(seconds[name]):.3f} to {max(seconds[name]):.3f}"
        print(f"    {name:32} {median:9.3f} s   x {median / ours:8.2f}   ({spread})", flush=True)
    return medians


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    return {"machine": platform.platform(), "python": platform.python_version()}


def write(path: Path | None, results: dict) -> None:
    """Keep the results as JSON, where a file is wanted."""
    if path:
        path.write_text(json.dumps({**machine(), **results}, indent=2) + "\n", encoding="utf-8")
