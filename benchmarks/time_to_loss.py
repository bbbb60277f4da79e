"""Time to a loss on tiny Shakespeare, against nanoGPT, from the start of the process.

    python -m benchmarks.time_to_loss --nanogpt=DIR [--baby=N]

nanoGPT's README run for the machine (the CPU's example, or the baby GPT on a GPU) is timed as a
process, with its own evaluations, and the checkpoint it leaves is evaluated on the whole
validation text. nanolm's runs are processes, too, and are timed up to the first line that shows
the wanted loss on the whole validation text: config/shakespeare_cpu.py (or config/shakespeare.py)
as it is, and the same with a plan as short as that loss needs. All start with an empty cache of
compiled code.

--baby=N compares another thing: the losses of the two baby GPTs, of as many parameters, after N
updates of 16 sequences, each with its own plan for so many. It is for CPUs, where the whole plan
of 5,000 updates would take days.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from pathlib import Path

import torch

from benchmarks.compare import arguments, at_least_1, run_benchmark, write
from benchmarks.nanogpt import CPU_RUN, GPU_RUN, copy_with_data, model_module, trained_model
from nanolm.batches import evaluation_batches
from nanolm.evaluation import evaluate, mean_loss
from nanolm.runs.prepare import find_dataset
from nanolm.text.data import Dataset

ROOT = Path(__file__).resolve().parent.parent
EVALUATION = re.compile(r"step +\d+ \|.* val loss ([\d.]+)")
GPU = torch.cuda.is_available()


def nanogpt_run(checkout: Path, dataset: Dataset, command: str) -> dict:
    """Its seconds, and the loss of the checkpoint it leaves on the whole validation text."""
    with tempfile.TemporaryDirectory() as folder:
        copy_with_data(checkout, Path(folder), dataset)
        start = time.perf_counter()
        words = [sys.executable, "train.py", *command.split()]
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"}
        subprocess.run(words, cwd=folder, check=True, stdout=subprocess.DEVNULL, env=environment)
        seconds = time.perf_counter() - start
        saved = Path(folder) / "out-shakespeare-char" / "ckpt.pt"
        model = trained_model(checkout, saved, dataset.tokenizer.vocab_size)
    return {"seconds": seconds, "loss": full_loss(model, dataset)}


def full_loss(model: torch.nn.Module, dataset: Dataset) -> float:
    """The loss of nanoGPT's model on each token of the validation text but the first, once."""
    shape = {"batch_size": 64, "block_size": model.config.block_size}
    batches = (
        {"idx": torch.from_numpy(batch["ids"]), "targets": torch.from_numpy(batch["targets"])}
        for batch in evaluation_batches(dataset.val, **shape)
    )
    return mean_loss(evaluate(model, batches))


def nanolm_run(arguments: list[str], target: float) -> dict:
    """Seconds to the first evaluation at the target or below, and in all; and the last loss."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "train.py", *arguments, f"--out_dir={folder}/run"]
        command += ["--eval_iters=0", "--sample_tokens=0"]
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"}
        start, reached, loss = time.perf_counter(), None, None
        pipe = {"stdout": subprocess.PIPE, "text": True, "env": environment}
        with subprocess.Popen(command, **pipe) as process:
            for line in process.stdout:
                if found := EVALUATION.match(line):
                    loss = float(found[1])
                    if reached is None and loss <= target:
                        reached = time.perf_counter() - start
        if process.returncode:
            raise RuntimeError(f"{command} ended with exit code {process.returncode}")
    return {"seconds": time.perf_counter() - start, "loss": loss, "reached": reached}


def parser() -> ArgumentParser:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--target", type=float, default=1.47 if GPU else 1.89, help="the loss")
    short = {"type": at_least_1, "default": 1500 if GPU else 130}
    parser.add_argument("--short", **short, help="updates of the short plan")
    parser.add_argument(
        "--baby", type=at_least_1, help="compare the baby GPTs after so many updates"
    )
    return parser


def baby_pair(checkout: Path, dataset: Dataset, n: int) -> dict:
    """The baby GPTs, after n updates each."""
    plan = f"--max_iters={n} --lr_decay_iters={n} --warmup_iters={n // 10} --eval_interval={n}"
    plan += " --batch_size=16 --device=cpu"
    theirs = f"{GPU_RUN} {plan} --eval_iters=1 --compile=False"
    ours = [str(ROOT / "config" / "shakespeare.py"), *plan.split(), "--compile=false"]
    return {
        "nanoGPT": nanogpt_run(checkout, dataset, theirs),
        "nanolm": nanolm_run(ours, 0.0),
    }


def show(name: str, run: dict, target: float, theirs: float) -> None:
    """Print a line on a run."""
    line = f"    {name:20} {run['seconds']:7.1f} s, loss {run['loss']:.4f}"
    if "reached" in run:
        reached = run["reached"]
        line += f"; {target} after {reached:.1f} s" if reached else f"; {target} never"
        line += f", {theirs / reached:.2f} x sooner than nanoGPT's end" if reached else ""
    print(line, flush=True)


def main(words: list[str]) -> None:
    options = parser().parse_args(words)
    model_module(options.nanogpt)  # what is no checkout shows before an hour of work
    config = "config/shakespeare.py" if GPU else "config/shakespeare_cpu.py"
    dataset = find_dataset("shakespeare_char")
    short = [f"--max_iters={options.short}", f"--eval_interval={options.short}"]
    results = []
    for turn in range(options.repeats):
        if options.baby:
            runs = baby_pair(options.nanogpt, dataset, options.baby)
        else:
            runs = {
                "nanoGPT": nanogpt_run(options.nanogpt, dataset, GPU_RUN if GPU else CPU_RUN),
                "nanolm, short plan": nanolm_run([str(ROOT / config), *short], options.target),
                "nanolm": nanolm_run([str(ROOT / config)], options.target),
            }
        results.append(runs)
        print(f"turn {turn + 1}")
        for name, run in runs.items():
            show(name, run, options.target, runs["nanoGPT"]["seconds"])
    write(options.json, {"turns": results})


if __name__ == "__main__":
    run_benchmark(main)
