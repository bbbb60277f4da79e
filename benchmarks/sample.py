"""Sampling speed against Hugging Face's generate, with its cache, and nanoGPT's.

    python -m benchmarks.sample [--nanogpt=DIR]

The baby GPT's shape with random weights, float32: what is written is noise, and takes as long.
"""

from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.compare import arguments, at_least_1, clock_for, contest, run_benchmark, write
from benchmarks.nanogpt import model_module
from nanolm.layers import ModelConfig
from nanolm.model import GPT
from nanolm.precision import choose_device, find_hardware
from nanolm.sampling import generate

SHAPE = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 65}
KNOBS = {"temperature": 0.8, "top_k": 50}


def nanolm_sample(ids: torch.Tensor, n: int) -> Callable[[], None]:
    """Ours, as sample.py does it; each token is read, as one who shows the text has to."""
    model = GPT(ModelConfig(**SHAPE)).to(ids.device).eval()

    def run() -> None:
        with torch.inference_mode():
            for step in generate(model, ids, max_new_tokens=n, **KNOBS):
                step.tolist()

    return run


def huggingface_sample(ids: torch.Tensor, n: int, cache: str) -> Callable[[], None]:
    """That of transformers' GPT-2, with a cache that grows (dynamic) or has its full length."""
    sizes = {key: SHAPE[key] for key in ("n_layer", "n_head", "n_embd", "vocab_size")}
    ends = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": SHAPE["vocab_size"] - 1}
    config = GPT2Config(**sizes, n_positions=SHAPE["block_size"], **ends)
    model = GPT2LMHeadModel(config).to(ids.device).eval()
    mask = torch.ones_like(ids)
    knobs = {"do_sample": True, "cache_implementation": cache, "max_new_tokens": n, **KNOBS}
    return lambda: model.generate(ids, attention_mask=mask, **knobs)


def nanogpt_sample(ids: torch.Tensor, n: int, checkout: Path) -> Callable[[], None]:
    """nanoGPT's, which has no cache."""
    module = model_module(checkout)
    model = module.GPT(module.GPTConfig(**SHAPE, dropout=0.0, bias=False)).to(ids.device).eval()

    def run() -> None:
        with torch.no_grad():
            model.generate(ids, n, **KNOBS)

    return run


def parser() -> ArgumentParser:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--tokens", type=at_least_1, default=250, help="how many to write")
    parser.add_argument("--device", default="cpu")
    return parser


def main(words: list[str]) -> None:
    options = parser().parse_args(words)
    device, _ = choose_device(find_hardware(), options.device)
    results = {}
    for batch in (1, 8):
        ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
        runs = {
            "nanolm": nanolm_sample(ids, options.tokens),
            "transformers": huggingface_sample(ids, options.tokens, "dynamic"),
            "transformers, static cache": huggingface_sample(ids, options.tokens, "static"),
        }
        if options.nanogpt:
            runs["nanoGPT"] = nanogpt_sample(ids, options.tokens, options.nanogpt)
        for run in runs.values():
            run()  # warms up
        work = f"{options.tokens} tokens, batch {batch}"
        clock = clock_for(device)
        seconds = contest(work, runs, repeats=options.repeats, clock=clock)
        speeds = {name: batch * options.tokens / median for name, median in seconds.items()}
        print("   ", ", ".join(f"{name} {speed:,.0f} tokens/s" for name, speed in speeds.items()))
        results[f"batch {batch}"] = speeds
    write(options.json, results)


if __name__ == "__main__":
    run_benchmark(main)
