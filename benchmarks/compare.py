"""Contests: the same work by several programs, in turns, on one machine, in one run.

Machines are busy and drift, so a time alone means little. The contestants take turns, each time is
the median of its turns, and what counts is the ratio.
"""

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

Clock = Callable[[Callable[[], object]], float]  # the seconds that a call takes


def at_least_1(word: str) -> int:
    """A number on the command line."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word}: must be at least 1")
    return int(word)


def new_file(word: str) -> Path:
    """A path on the command line, in a folder that is there."""
    if not Path(word).parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {Path(word).parent}")
    return Path(word)


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repeats", type=at_least_1, default=3, help="turns of each contestant")
    parser.add_argument("--json", type=new_file, help="also write the results to this file")
    return parser


def run_benchmark(main: Callable[[list[str]], None]) -> None:
    """Run a benchmark on the words of the command line; what the user can cause is one line."""
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, ImportError, AttributeError) as error:
        sys.exit(f"error: {error}")
    except subprocess.CalledProcessError as error:  # it has said why
        sys.exit(f"error: {error.cmd[:3]} ended with exit code {error.returncode}")


def megabytes(field: str) -> float:
    """A number of this process that Linux knows: VmHWM, the peak; VmRSS, what it holds now."""
    status = Path("/proc/self/status").read_text()  # getrusage counts the parent's, too
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024 / 1e6


def plain_updates(
    model: torch.nn.Module,
    data: Iterable[Any],
    loss_of: Callable[[Any], torch.Tensor],
    rate: float,
) -> Callable[[], None]:
    """An update with AdamW on each batch, as one writes it for a model of transformers."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)

    def run() -> None:
        for batch in data:
            loss = loss_of(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()

    return run


def wall(run: Callable[[], object]) -> float:
    """Seconds on the clock on the wall."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def on_gpu(run: Callable[[], object]) -> float:
    """Seconds between two events on the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def clock_for(device: str) -> Clock:
    """The clock for work on a device."""
    return on_gpu if device.startswith("cuda") else wall


def contest(
    work: str,
    contestants: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    clock: Clock = wall,
) -> dict[str, float]:
    """Median seconds of each contestant; printed with the ratio to the first, which is ours."""
    seconds = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            seconds[name].append(clock(run))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ours = next(iter(medians.values()))
    print(work)
    for name, median in medians.items():
        spread = f"{min(seconds[name]):.3f} to {max(seconds[name]):.3f}"
        print(f"    {name:32} {median:9.3f} s   x {median / ours:8.2f}   ({spread})", flush=True)
    return medians


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    found = {"machine": platform.platform(), "python": platform.python_version()}
    found |= {"torch": torch.__version__, "threads": str(torch.get_num_threads())}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return found


def write(path: Path | None, results: dict) -> None:
    """Keep the results as JSON, where a file is wanted."""
    if path:
        path.write_text(json.dumps({**machine(), **results}, indent=2) + "\n", encoding="utf-8")
