"""Memory and speed of each layout of a model, on a CPU.

    python -m benchmarks.layouts

Each layout trains a model of random tokens for a few updates, in processes of one thread. The peak
is the highest resident memory of a process, less what it held before there was a model; beside it
stands what nanolm.plan computes. The allocator gives memory back at once, as a GPU's counts it.
"""

import json
import os
import socket
import subprocess
import sys
import time
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.compare import arguments, megabytes, run_benchmark, write
from nanolm.model import build_model
from nanolm.parallel import World
from nanolm.plan.costs import Costs, Layout
from nanolm.precision import Engine
from nanolm.runs.settings import TrainConfig
from nanolm.runs.start import build_state, fresh_model
from nanolm.training import update, warm_up_ddp

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = {
    "one": (1, {}),
    "replicas": (2, {}),
    "shards of 2": (2, {"shard": True}),
    "split in 2": (2, {"tensor_parallel": 2}),
    "replicas of 4": (4, {}),
    "shards of 4": (4, {"shard": True}),
    "split in 4": (4, {"tensor_parallel": 4}),
    "both, 2 x 2": (4, {"shard": True, "tensor_parallel": 2}),
}
SHAPE = {
    "vocab_size": 4096,
    "block_size": 128,
    "n_layer": 8,
    "n_head": 8,
    "n_embd": 512,
    "batch_size": 2,
    "gradient_accumulation_steps": 4,
    "warmup_iters": 0,
}


def batches_of(config: TrainConfig, step: int) -> list[dict]:
    """The micro-batches of an update."""
    random = np.random.default_rng(step)
    shape = (config.gradient_accumulation_steps, config.batch_size, config.block_size + 1)
    ids = random.integers(config.vocab_size, size=shape)
    return [{"ids": each[:, :-1].copy(), "targets": each[:, 1:].copy()} for each in ids]


def measure(keys: dict, updates: int, dtype: str) -> dict:
    """Train in this process, one of those that torchrun's variables tell of."""
    torch.set_num_threads(1)
    config, size = TrainConfig(**keys), int(os.environ["WORLD_SIZE"])
    rank = int(os.environ["RANK"])
    world = World(rank, size, shard=config.shard, tensor=config.tensor_parallel)
    if size > 1:
        dist.init_process_group("gloo")
    engine = Engine("cpu", dtype, compile=False)
    small = dict(keys, n_layer=1, n_embd=64, n_head=8, vocab_size=64, n_hidden=64, block_size=8)
    for each in (TrainConfig(**small), config):
        before = megabytes("VmRSS")
        state = build_state(each, fresh_model(each, build_model, world), engine, world)
        with world.sharing_gradients(state.forward) as state.forward:
            if world.replicates:
                warm_up_ddp(state, batches_of(each, 0)[0], engine)
            times = []
            for step in range(updates):
                data, started = batches_of(each, step), time.perf_counter()
                update(state, data, learning_rate=1e-4, engine=engine, world=world)
                times.append(time.perf_counter() - started)
            trained = megabytes("VmHWM")
            state.state_dict(world)
            saved = megabytes("VmHWM")
    if size > 1:
        dist.destroy_process_group()
    rate = config.tokens_per_update / float(np.median(times[1:]))
    return {"peak": trained - before, "saving": saved - before, "rate": rate}


def train(size: int, keys: dict, updates: int = 4, dtype: str = "float32") -> list[dict]:
    """measure in so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    command = [sys.executable, "-m", "benchmarks.layouts"]
    command += [f"--one={json.dumps(keys)}", f"--updates={updates}", f"--dtype={dtype}"]
    children = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **GIVE_BACK, **variables, "RANK": str(rank)},
        )
        for rank in range(size)
    ]
    return [json.loads(child.communicate()[0]) for child in children]


def planned(size: int, keys: dict, dtype: str = "float32") -> float:
    """MB of a process at its peak, as nanolm.plan computes them."""
    config = TrainConfig(**keys)
    tensor = config.tensor_parallel
    layout = Layout(size // tensor, tensor, config.shard, config.recompute)
    return Costs(config, layout, dtype=dtype, device="cpu").total() / 1e6


def parser() -> ArgumentParser:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--one", help="measure this layout, in this process")
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--keys", default="{}", help="other keys of the model, as JSON")
    return parser


def main(words: list[str]) -> None:
    options = parser().parse_args(words)
    if options.one:
        print(json.dumps(measure(json.loads(options.one), options.updates, options.dtype)))
        return
    results = {}
    print(f"{'':14} {'peak MB':>8} {'of one':>8} {'planned':>8} {'saving':>8} {'tok/s':>8}")
    for layout, (size, flags) in LAYOUTS.items():
        keys = {**SHAPE, **json.loads(options.keys), **flags}
        results[layout] = train(size, keys, options.updates, options.dtype)
        peak = max(each["peak"] for each in results[layout])
        share, plan = peak / results["one"][0]["peak"], planned(size, keys, options.dtype)
        first = results[layout][0]
        print(
            f"{layout:14} {peak:8,.0f} {share:8.2f} {plan:8,.0f} {first['saving']:8,.0f} "
            f"{first['rate']:8,.0f}",
            flush=True,
        )
    write(options.json, results)


if __name__ == "__main__":
    run_benchmark(main)
