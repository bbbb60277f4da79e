"""Sample from a trained model: python sample.py [--out_dir=PATH] [--key=value ...]"""

import sys
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch

from nanolm.config import load_config, run_script
from nanolm.corpus import read_text
from nanolm.engine import choose_engine, find_hardware
from nanolm.folder import load_trained, newest_run
from nanolm.sampling import check_knobs, generate, until
from nanolm.tokenizer import stream_text


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """The keys of sample.py. Names and defaults are nanoGPT's where it has them."""

    init_from: str = "resume"  # resume (the run in out_dir) | folder of a run
    out_dir: str | None = None  # the run; None: the one in out/ that was trained last
    start: str = "\n"  # the prompt, or FILE:prompt.txt
    num_samples: int = 10  # how many texts
    max_new_tokens: int = 500  # longest text, in tokens
    temperature: float = 0.8  # below 1: safer; above 1: wilder; 0: always the most likely token
    top_k: int | None = 200  # only the k most likely tokens; 0: all
    top_p: float | None = None  # only the likeliest tokens that together reach p
    stop: str | None = None  # end a text before this string
    seed: int = 1337  # of the drawing
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16
    compile: bool | str = "auto"  # auto (never, for sampling) | True | False

    def __post_init__(self):
        if self.num_samples < 1:
            raise ValueError(f"num_samples={self.num_samples}: must be at least 1")
        check_knobs(self.max_new_tokens, self.temperature, self.top_k, self.top_p)


def read_prompt(start: str) -> str:
    """The text to continue: start itself, or the content of the file it names."""
    text = start
    if start.startswith("FILE:"):
        path = Path(start.removeprefix("FILE:"))
        if not path.is_file():
            raise FileNotFoundError(f"start={start!r}: there is no such file")
        text = read_text(path)
    if not text:
        raise ValueError(f"start={start!r}: the prompt is empty; give at least one character")
    return text


def main(arguments: list[str]) -> None:
    config = load_config(SampleConfig, arguments)
    prompt = read_prompt(config.start)
    machine = {"device": config.device, "dtype": config.dtype, "compile": config.compile}
    engine = choose_engine(find_hardware(), **machine)
    resume = config.init_from == "resume"
    folder = (config.out_dir or newest_run()) if resume else config.init_from
    model, tokenizer, step = load_trained(folder)
    model = model.to(engine.device)
    if engine.compile:
        model.compile(dynamic=True)
    ids = tokenizer.encode(prompt, allowed_special="all")
    ids = torch.tensor([ids], dtype=torch.long, device=engine.device)
    print(f"sampling from {folder}, step {step}, {engine.device} {engine.dtype}", file=sys.stderr)
    knobs = {
        key: getattr(config, key) for key in ("max_new_tokens", "temperature", "top_k", "top_p")
    }
    generator = torch.Generator(engine.device).manual_seed(config.seed)
    with engine.autocast():
        for _ in range(config.num_samples):
            print(prompt, end="", flush=True)
            tokens = (int(token) for token in generate(model, ids, **knobs, generator=generator))
            document = takewhile(lambda token: token != tokenizer.end_of_text, tokens)
            for piece in until(stream_text(tokenizer, document), config.stop):
                print(piece, end="", flush=True)
            print("\n---------------")


if __name__ == "__main__":
    run_script(main, __doc__, SampleConfig)
