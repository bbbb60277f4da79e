"""Training speed against nanoGPT: the same shapes, batches and float32 weights, update by update.

    python -m benchmarks.train --nanogpt=DIR [--shapes cpu-12 cpu-64 baby gpt2]

nanoGPT runs as its README says for the machine: uncompiled float32 on a CPU, compiled bfloat16 on
a GPU. nanolm runs as dtype=auto has it, compiled where that can be. Compiling is not counted here;
it is in benchmarks.time_to_loss.
"""

import contextlib
import io
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from benchmarks.compare import (
    arguments,
    at_least_1,
    clock_for,
    contest,
    matmul_rate,
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


def nanogpt_updates(
    config: TrainConfig, engine: Engine, n: int, module: ModuleType
) -> Callable[[], None]:
    """Does n updates as nanoGPT's train.py does them."""
    keys = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout", "bias")
    gpu, kind = engine.device_type == "cuda", engine.device_type
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        model = module.GPT(module.GPTConfig(**{key: getattr(config, key) for key in keys}))
        model = model.to(engine.device)
        optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.99), kind)
    forward = torch.compile(model) if gpu else model
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


def measure(name: str, device: str, module: ModuleType, *, updates: int, repeats: int) -> dict:
    """One shape: both of them."""
    vocab_size, dropout = VOCABULARY.get(name, 65), DROPOUT.get(name, 0.0)
    config = TrainConfig(vocab_size=vocab_size, dropout=dropout, beta2=0.99, **SHAPES[name])
    config = replace(config, gradient_accumulation_steps=1)
    hardware = find_hardware()
    engine = choose_engine(hardware, device=device, flops=float("inf"))
    clock, dtype = clock_for(engine.device), getattr(torch, engine.dtype)
    makers = {
        "nanolm": lambda: nanolm_updates(config, engine, updates),
        "nanoGPT": lambda: nanogpt_updates(config, engine, updates, module),
    }
    runs, peaks, gpu = {}, {}, engine.device_type == "cuda"
    for who, make in makers.items():
        before = torch.cuda.memory_allocated() if gpu else 0
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        runs[who] = make()
        for _ in range(2):
            runs[who]()  # compiles, and warms up
        peaks[who] = (torch.cuda.max_memory_allocated() - before) / 1e9 if gpu else None
    kind = f"{engine.device} {engine.dtype} {'compiled' if engine.compile else 'uncompiled'}"
    seconds = contest(f"{name}: {updates} updates, {kind}", runs, repeats=repeats, clock=clock)
    with torch.device("meta"):
        flops = flops_per_token(GPT(config.model_config()))
    rate = matmul_rate(engine.device, dtype, clock, 8192 if gpu else 2048)
    result = {"engine": kind, "matmul GFLOP/s": rate / 1e9}
    for who, median in seconds.items():
        speed = updates * config.tokens_per_update / median
        part = speed * flops / rate
        row = {"tokens/s": speed, "share of the matmul rate": part}
        if gpu:
            row["peak GB"] = peaks[who]
        print(f"    {who:10} {speed:12,.0f} tokens/s   {part:5.1%} of {rate / 1e9:,.0f} GFLOP/s")
        result[who] = row
    return result | {"ratio": seconds["nanoGPT"] / seconds["nanolm"]}


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
