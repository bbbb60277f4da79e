"""Training speed of an encoder against transformers: the same model, padded batches, float32.

    python -m benchmarks.encoder [--dataset=pymodules]

A small EuroBERT labels the texts of a dataset. transformers gets it as an export, and each text as
often: in nanolm's batches, where texts of similar length come together, and in batches as they
come when the texts are shuffled, which is what its Trainer makes. What counts is the tokens of
texts, and no padding. nanolm is compiled where that can be.
"""

import math
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

from benchmarks.compare import (
    arguments,
    at_least_1,
    clock_for,
    contest,
    plain_updates,
    run_benchmark,
    write,
)
from nanolm.batches import Batch
from nanolm.hub.models import export_model
from nanolm.precision import choose_engine, find_hardware
from nanolm.runs.prepare import find_dataset
from nanolm.runs.settings import TrainConfig
from nanolm.runs.start import build_state
from nanolm.tasks.classification import ClassificationTask
from nanolm.tasks.table import make_task
from nanolm.text.data import Dataset
from nanolm.training import update

SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "causal": False}
SHAPE |= {"norm": "rms", "position": "rotary", "mlp": "swiglu"}


def shuffled(task: ClassificationTask, dataset: Dataset, n: int) -> list[Batch]:
    """So many batches of texts in a random order, each filled up to its longest."""
    order, size = np.random.default_rng(0).permutation(len(dataset.train)), task.batch_size
    groups = (order[i * size :][:size] for i in range(n))
    return [task.gather(dataset.train, group) for group in groups]


def their_updates(folder: str, data: list[Batch], device: torch.device) -> Callable[[], None]:
    """An update of transformers' model on each batch."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).to(device).train()

    def loss_of(batch: Batch) -> torch.Tensor:
        ids, mask, labels = (
            torch.from_numpy(batch[key]).to(device) for key in ("ids", "mask", "targets")
        )
        return model(ids, attention_mask=mask.long(), labels=labels[:, 0]).loss

    return plain_updates(model, data, loss_of, 1e-4)


def parser() -> ArgumentParser:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="pymodules", help="with labels of texts")
    parser.add_argument("--batch_size", type=at_least_1, default=32, help="texts of a batch")
    parser.add_argument("--device", default="auto")
    return parser


def main(words: list[str]) -> None:
    options = parser().parse_args(words)
    dataset = find_dataset(options.dataset)
    labels, vocab_size = tuple(dataset.meta["labels"]), dataset.tokenizer.vocab_size
    config = TrainConfig(
        task="classification",
        head="text",
        labels=labels,
        vocab_size=vocab_size,
        block_size=128,
        batch_size=options.batch_size,
        beta2=0.99,
        **SHAPE,
    )
    config = replace(config, gradient_accumulation_steps=1)
    engine = choose_engine(find_hardware(), device=options.device, dtype="float32", flops=math.inf)
    task = make_task(config, dataset.tokenizer)
    n = task.batches_per_epoch(dataset)
    bucketed = [task.batch(dataset, i) for i in range(n)]
    torch.manual_seed(0)
    state = build_state(config, task.model(config.model_config()), engine)
    state.model.train()

    def ours() -> None:
        for batch in bucketed:
            update(state, [batch], learning_rate=1e-4, engine=engine)

    with TemporaryDirectory() as place:
        export_model(state.model, dataset.tokenizer, Path(place) / "model")
        folder = f"{place}/model"
        runs = {
            "nanolm": ours,
            "transformers, the same batches": their_updates(folder, bucketed, engine.device),
            "transformers, shuffled batches": their_updates(
                folder, shuffled(task, dataset, n), engine.device
            ),
        }
    for run in runs.values():
        run()  # compiles, and warms up
    kind = f"{engine.device} float32 {'compiled' if engine.compile else 'uncompiled'}"
    clock = clock_for(engine.device)
    seconds = contest(
        f"{options.dataset}: {n} updates, {kind}", runs, repeats=options.repeats, clock=clock
    )
    tokens = sum(int(batch["mask"].sum()) for batch in bucketed)
    result = {who: {"tokens/s": tokens / median} for who, median in seconds.items()}
    for who, row in result.items():
        print(f"    {who:32} {row['tokens/s']:9,.0f} tokens/s")
    write(options.json, result)


if __name__ == "__main__":
    run_benchmark(main)
