"""Peak memory of the loss and its backward pass, with all logits and in chunks.

    python -m benchmarks.memory

Each runs in a process of its own. On a CPU the peak is that of the process (its highest resident
memory, less the highest before); on a GPU, that of the allocator. It takes 2.5 GB and minutes.
"""

import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks.compare import arguments, clock_for, contest, megabytes, run_benchmark, write
from nanolm.loss import cross_entropy, projected_cross_entropy
from nanolm.precision import choose_device, find_hardware

WAYS = {
    "in chunks": projected_cross_entropy,
    "all logits": lambda x, weight, targets: cross_entropy(F.linear(x, weight), targets),
}
ROOT = Path(__file__).resolve().parent.parent
TOKENS, CHANNELS, VOCABULARY = (4, 1024), 768, 50257


def peak(device: str) -> float:
    """The highest memory use so far, in MB."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e6
    return megabytes("VmHWM")


def inputs_of(tokens: tuple[int, int], vocabulary: int, device: str) -> tuple[torch.Tensor, ...]:
    """x, weight and targets."""
    torch.manual_seed(0)
    x = torch.randn(*tokens, CHANNELS, device=device, requires_grad=True)
    weight = torch.randn(vocabulary, CHANNELS, device=device, requires_grad=True)
    return x, weight, torch.randint(vocabulary, tokens, device=device)


def measure(way: str, device: str) -> float:
    """MB that one way takes, beside what goes in. To be called in a fresh process."""
    small = inputs_of((2, 3), 7, device)
    WAYS[way](*small).backward()  # so that libraries have what they need
    inputs = inputs_of(TOKENS, VOCABULARY, device)
    before = peak(device)
    WAYS[way](*inputs).backward()
    return peak(device) - before


def parser() -> ArgumentParser:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--way", choices=WAYS, help="measure one way, in this process")
    return parser


def main(words: list[str]) -> None:
    options = parser().parse_args(words)
    device, _ = choose_device(find_hardware(), options.device)
    if options.way:
        print(measure(options.way, device))
        return
    results = {}
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.memory", f"--way={way}"]
        command += [f"--device={device}"]
        out = subprocess.run(
            command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        results[way] = float(out)
    first = results["in chunks"]
    print(f"loss and backward, {TOKENS[0]} x {TOKENS[1]} tokens of {VOCABULARY} kinds")
    for way, size in results.items():
        print(f"    {way:12} {size:8.0f} MB   x {size / first:6.2f}")
    inputs = inputs_of(TOKENS, VOCABULARY, device)
    runs = {
        name: lambda way=way: torch.autograd.grad(way(*inputs), inputs[:2])
        for name, way in WAYS.items()
    }
    for way in runs.values():
        way()  # warms up
    seconds = contest("and their time", runs, repeats=options.repeats, clock=clock_for(device))
    write(options.json, {"peak MB": results, "seconds": seconds})


if __name__ == "__main__":
    run_benchmark(main)
