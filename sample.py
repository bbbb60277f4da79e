"""Sample from a trained model: python sample.py [--out_dir=PATH] [--key=value ...]"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, just ends them
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from nanolm.layers import require_at_least
from nanolm.precision import Engine, Hardware, choose_device, choose_engine, find_hardware
from nanolm.runs.folder import newest_run
from nanolm.runs.load import load_model
from nanolm.sampling import check_generation_options, until
from nanolm.system.config import load_config
from nanolm.system.script import run_script
from nanolm.tasks.table import task_of
from nanolm.text.documents import read_text


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """The keys of sample.py. Names and defaults are nanoGPT's where it has them."""

    init_from: str = "resume"  # resume (the run in out_dir) | gpt2 | FOLDER | OWNER/NAME
    out_dir: str | None = None  # the run; None: the one in out/ that was trained last
    start: str | None = None  # the prompt, or FILE:prompt.txt; None: the model begins
    num_samples: int = 10  # how many texts
    batch_size: int = 8  # how many of them are written at a time
    max_new_tokens: int = 500  # longest text, in tokens
    temperature: float = 0.8  # below 1: safer; above 1: wilder; 0: always the most likely token
    top_k: int | None = 200  # only the k most likely tokens; 0: all
    top_p: float | None = None  # only the likeliest tokens that together reach p
    stop: str | None = None  # end a text before this string
    seed: int = 1337  # of the drawing; another batch_size draws other texts
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16
    compile: bool | str = "auto"  # auto (on a GPU, for many tokens) | True | False

    def __post_init__(self):
        require_at_least(self, 1, "num_samples batch_size")
        check_generation_options(self.max_new_tokens, self.temperature, self.top_k, self.top_p)


def read_prompt(start: str | None) -> str:
    """The text to continue: start itself, or the content of the file it names."""
    if start is None:
        return ""
    text = start
    if start.startswith("FILE:"):
        path = Path(start.removeprefix("FILE:"))
        if not path.is_file():
            raise FileNotFoundError(f"start={start!r}: there is no such file")
        text = read_text(path)
    if not text:
        raise ValueError(f"start={start!r}: the prompt is empty; give at least one character")
    return text


# On a GPU, a step of a small batch takes as long as it takes to start its kernels, and compiled it
# has few. Compiling takes about a minute: by estimate, so many steps earn it back.
COMPILE_FROM_STEPS = 20_000


def sampling_engine(config: SampleConfig, hardware: Hardware) -> Engine:
    """The engine for the texts that the config asks for."""
    steps = config.max_new_tokens * math.ceil(config.num_samples / config.batch_size)
    gpu = choose_device(hardware, config.device)[0].startswith("cuda")
    work = math.inf if gpu and steps >= COMPILE_FROM_STEPS else 0.0
    machine = {"device": config.device, "dtype": config.dtype, "compile": config.compile}
    return choose_engine(hardware, **machine, flops=work)


def main(arguments: list[str]) -> None:
    config = load_config(SampleConfig, arguments)
    prompt = read_prompt(config.start)
    engine = sampling_engine(config, find_hardware())
    resume = config.init_from == "resume"
    name = (config.out_dir or newest_run()) if resume else config.init_from
    if resume and not Path(name).is_dir():
        raise FileNotFoundError(f"out_dir={name!r}: there is no such folder")
    model, tokenizer, origin = load_model(name)
    model = model.to(engine.device)
    if engine.compile:
        model.compile(dynamic=True)
    tokenizer.encode(prompt, allowed_special="all")  # wrong characters show before the first line
    print(f"sampling from {origin}, {engine.device} {engine.dtype}", file=sys.stderr)
    keys = ("max_new_tokens", "temperature", "top_k", "top_p")
    task = task_of(model.config)
    options = {key: getattr(config, key) for key in keys}
    options["generator"] = torch.Generator(engine.device).manual_seed(config.seed)
    with engine.autocast():
        n_texts = config.num_samples if task.continues else 1  # there is one answer
        for first in range(0, n_texts, config.batch_size):
            n = min(config.batch_size, n_texts - first)
            for pieces in task.answer(model, tokenizer, prompt, n=n, **options):
                if task.continues:
                    print(prompt, end="", flush=True)
                for piece in until(pieces, config.stop):
                    print(piece, end="", flush=True)
                print("\n---------------")


if __name__ == "__main__":
    run_script(main, __doc__, SampleConfig)
