"""Training speed against nanoGPT: the same shapes, batches and float32 weights, update by update.

    python -m benchmarks.train --nanogpt=DIR [--shapes cpu-12 cpu-64 baby gpt2]

nanoGPT runs as its README says for the machine: float32 on a CPU, there both uncompiled, as the
README has it, and compiled; compiled bfloat16 on a GPU. nanolm runs as dtype=auto has it, compiled
where that can be, and in float32. Beside them stands the floor: the matrix products of an update
alone, on a CPU in float32. Compiling is not counted, but timed: so many updates earn it back.
"""

import contextlib
import io
import time
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.compare import (
    arguments,
    at_least_1,
    clock_for,
    contest,
    run_benchmark,
    write,
)
from benchmarks.nanogpt import model_module
from nanolm.batches import Batch
from nanolm.model import GPT, flops_per_token
from nanolm.precision import Engine, choose_engine, find_hardware
from nanolm.runs.settings import TrainConfig
from nanolm.runs.start import build_state
from nanolm.training import update

SHAPES = {
    "cpu-12": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12},
    "cpu-64": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 64},
    "baby": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 16},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "batch_size": 12},
}
VOCABULARY = {"gpt2": 50304}  # as nanoGPT pads it; characters otherwise
DROPOUT = {"baby": 0.2}  # as in its config


def batches(config: TrainConfig, n: int = 8) -> list[Batch]:
    """Random ids and targets, the same for everyone."""
    random = np.random.default_rng(0)
    shape = (n, 2, config.batch_size, config.block_size)
    pairs = random.integers(config.vocab_size, size=shape)
    return [{"ids": ids, "targets": targets} for ids, targets in pairs]


def nanolm_updates(config: TrainConfig, engine: Engine, n: int) -> Callable[[], None]:
    """Does n updates of ours."""
    torch.manual_seed(0)
    state = build_state(config, GPT(config.model_config()), engine)
    state.model.train()
    data = batches(config)

    def run() -> None:
        for _ in range(n):
            update(state, [data[state.step % len(data)]], learning_rate=1e-4, engine=engine)

    return run


class Products(TorchDispatchMode):
    """Notes each matrix product that is computed within it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple, kwargs: Any = None
    ) -> Any:
        if function.overloadpacket in (
            torch.ops.aten.mm,
            torch.ops.aten.bmm,
            torch.ops.aten.addmm,
        ):
            self.calls.append((function, [arg.detach() for arg in args]))
        return function(*args, **(kwargs or {}))


def bare_products(config: TrainConfig, engine: Engine, n: int) -> Callable[[], None]:
    """Does the matrix products of n of our updates, attention's by the formula."""
    narrow = engine.dtype if engine.device_type == "cuda" else "float32"
    engine = Engine(engine.device, narrow, compile=False)
    with patch("nanolm.attention.prefer_formula", return_value=True), Products() as products:
        nanolm_updates(config, engine, 1)()

    def run() -> None:
        for _ in range(n):
            for function, args in products.calls:
                function(*args)

    return run


def nanogpt_updates(
    config: TrainConfig, engine: Engine, n: int, module: ModuleType, compiled: bool = False
) -> Callable[[], None]:
    """Does n updates as nanoGPT's train.py does them."""
    keys = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout", "bias")
    gpu, kind = engine.device_type == "cuda", engine.device_type
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        model = module.GPT(module.GPTConfig(**{key: getattr(config, key) for key in keys}))
        model = model.to(engine.device)
        optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.99), kind)
    forward = torch.compile(model) if compiled else model
    context = torch.autocast("cuda", torch.bfloat16) if gpu else contextlib.nullcontext()
    data = batches(config)

    def run() -> None:
        for i in range(n):
            ids, targets = map(torch.from_numpy, data[i % len(data)].values())
            if gpu:
                ids, targets = (
                    part.pin_memory().to(engine.device, non_blocking=True)
                    for part in (ids, targets)
                )
            with context:
                _, loss = forward(ids, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()

    return run


def makers(config: TrainConfig, auto: Engine, n: int, module: ModuleType) -> dict:
    """What makes the updates of each contestant, by its name; first ours, as auto has it."""

    def words(dtype: str, compiled: bool) -> str:
        return f"{dtype} {'compiled' if compiled else 'uncompiled'}"

    engines = [auto]
    if auto.device_type == "cpu":
        engines += [replace(auto, compile=False)]
        engines += [replace(engine, dtype="float32") for engine in engines]
    found = {
        f"nanolm {words(e.dtype, e.compile)}": partial(nanolm_updates, config, e, n)
        for e in dict.fromkeys(engines)
    }
    gpu = auto.device_type == "cuda"
    for compiled in (True,) if gpu else (False, True):
        name = f"nanoGPT {words('bfloat16' if gpu else 'float32', compiled)}"
        found[name] = partial(nanogpt_updates, config, auto, n, module, compiled)
    return found | {"matrix products alone": partial(bare_products, config, auto, n)}


def measure(name: str, device: str, module: ModuleType, *, updates: int, repeats: int) -> dict:
    """One shape: all of them."""
    vocab_size, dropout = VOCABULARY.get(name, 65), DROPOUT.get(name, 0.0)
    config = TrainConfig(vocab_size=vocab_size, dropout=dropout, beta2=0.99, **SHAPES[name])
    config = replace(config, gradient_accumulation_steps=1)
    engine = choose_engine(find_hardware(), device=device, flops=float("inf"))
    clock, gpu = clock_for(engine.device), engine.device_type == "cuda"
    runs, peaks, firsts = {}, {}, {}
    for who, make in makers(config, engine, updates, module).items():
        before = torch.cuda.memory_allocated() if gpu else 0
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        torch._dynamo.reset()
        start = time.perf_counter()
        runs[who] = make()
        runs[who]()  # compiles, and warms up
        firsts[who] = time.perf_counter() - start
        runs[who]()
        peaks[who] = (torch.cuda.max_memory_allocated() - before) / 1e9 if gpu else None
    seconds = contest(f"{name}: {updates} updates", runs, repeats=repeats, clock=clock)
    with torch.device("meta"):
        flops = flops_per_token(GPT(config.model_config())) * config.tokens_per_update
    ours, *_ = seconds
    theirs = min(median for who, median in seconds.items() if who.startswith("nanoGPT"))
    result = {"ratio": theirs / seconds[ours]}
    print(f"    {ours}: {result['ratio']:.2f} x the speed of the faster nanoGPT")
    for who, median in seconds.items():
        row = {"tokens/s": updates * config.tokens_per_update / median}
        row["share of the floor"] = seconds["matrix products alone"] / median
        row["GFLOP/s"] = flops * updates / median / 1e9
        if gpu:
            row["peak GB"] = peaks[who]
        eager = seconds.get(who.replace(" compiled", " uncompiled"), median)
        if eager > median:  # by it, one can draw the rule of choose_compile
            saved = (eager - median) / updates
            row["FLOPs that earn compiling back"] = firsts[who] / saved * flops
        print(f"    {who:30}", ", ".join(f"{key} {value:,.4g}" for key, value in row.items()))
        result[who] = row
    return result


def parser() -> ArgumentParser:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=["cpu-12", "cpu-64", "baby"]
    )
    parser.add_argument("--updates", type=at_least_1, default=10, help="in a turn")
    parser.add_argument("--device", default="auto")
    return parser


def main(words: list[str]) -> None:
    options = parser().parse_args(words)
    module = model_module(options.nanogpt)
    knobs = {"updates": options.updates, "repeats": options.repeats}
    results = {name: measure(name, options.device, module, **knobs) for name in options.shapes}
    write(options.json, results)


if __name__ == "__main__":
    run_benchmark(main)
