"""Attention by the formula and by PyTorch's fused kernel, for the rule prefer_formula.

    python -m benchmarks.attention [--compile]

Forward and backward of 4,096 tokens, and the step of a cache; by precision, length, width, and
what is masked or dropped. A number above 1 says how many times as long the fused kernel takes.
"""

from argparse import ArgumentParser
from collections.abc import Callable
from functools import partial
from itertools import product

import torch

from benchmarks.compare import Clock, arguments, clock_for, run_benchmark, write
from nanolm.attention import attention, fast_attention
from nanolm.precision import DTYPES, choose_device, find_hardware

TOKENS, HEAD = 4096, 64
LENGTHS, WIDTHS = (32, 64, 128, 256, 512, 1024), (128, 384, 768)
KINDS = ("causal", "dropout", "padded", "step")


def work(
    attend: Callable, kind: str, T: int, width: int, dtype: torch.dtype, device: str
) -> Callable:
    """A pass forward and backward; of a step, whose queries are single, forward alone."""
    B, nh = (8 if kind == "step" else max(1, TOKENS // T)), max(1, width // HEAD)
    options = {"dtype": dtype, "device": device, "requires_grad": kind != "step"}
    q = torch.randn(B, nh, 1 if kind == "step" else T, HEAD, **options)
    k, v = (torch.randn(B, nh, T, HEAD, **options) for _ in range(2))
    knobs = {"causal": kind != "padded", "dropout": 0.1 if kind == "dropout" else 0.0}
    if kind == "padded":
        knobs["mask"] = (torch.arange(T, device=device) < T - T // 4).expand(B, 1, 1, T)

    def run() -> None:
        y = attend(q, k, v, **knobs)
        if kind != "step":
            y.sum().backward()

    return run


def ratio(runs: list[Callable], clock: Clock, repeats: int) -> float:
    """How many times as long the second of two takes: medians of turns."""
    for run in runs * 2:
        run()
    turns = torch.tensor([[clock(run) for run in runs] for _ in range(repeats)])
    formula, fused = turns.median(dim=0).values.tolist()
    return fused / formula


def parser() -> ArgumentParser:
    parser = arguments(__doc__.splitlines()[0])
    parser.set_defaults(repeats=7)
    parser.add_argument(
        "--compile", action="store_true", help="the formula, as training compiles it"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    return parser


def main(words: list[str]) -> None:
    options = parser().parse_args(words)
    device, _ = choose_device(find_hardware(), options.device)
    formula = torch.compile(attention, dynamic=False) if options.compile else attention
    torch._dynamo.config.recompile_limit = 1000
    results = {}
    for dtype, width, kind in product(options.dtypes, WIDTHS, KINDS):
        row = results[f"{dtype}, {width} channels, {kind}"] = {}
        for T in LENGTHS:
            make = partial(work, kind=kind, T=T, width=width, dtype=DTYPES[dtype], device=device)
            row[T] = ratio(
                [make(formula), make(fast_attention)], clock_for(device), options.repeats
            )
        cells = "   ".join(f"{T}: {value:5.2f}" for T, value in row.items())
        print(f"{dtype:9} {width:4} channels  {kind:8} {cells}", flush=True)
    write(options.json, results)


if __name__ == "__main__":
    run_benchmark(main)
