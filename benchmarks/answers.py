"""Training speed on texts and their answers: an encoder-decoder against transformers, and packing.

    python -m benchmarks.answers [--parts updates packing] [--KEY=VALUE ...]

updates: the encoder-decoder of config/translate_messages.py makes updates with AdamW in float32.
transformers gets it as an export, and the same examples in as many batches: in nanolm's own, where
examples of similar length come together, and in batches as they come when the examples are
shuffled, which is what its Trainer makes. Dropout is on in both, label smoothing in neither.

packing: a small GPT learns the answers of some conversations, each once, through nanolm's own
updates: several in a row, or each in a row of its own that is filled up. All batches hold about as
many examples. What counts is the tokens that carry loss.

Keys of a config change the shape of both, as --n_embd=64. nanolm is compiled where a run would be.
"""

import math
from argparse import ArgumentParser
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import AutoModelForSeq2SeqLM

from benchmarks.compare import (
    Clock,
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
from nanolm.loss import NO_TARGET
from nanolm.precision import Engine, choose_engine, find_hardware
from nanolm.runs.prepare import find_dataset
from nanolm.runs.settings import TrainConfig
from nanolm.runs.start import build_state, fit_to_task
from nanolm.system.config import load_config
from nanolm.tasks.completion import CompletionTask
from nanolm.tasks.table import make_task
from nanolm.text.data import Dataset
from nanolm.text.examples import Examples, packed
from nanolm.training import TrainState, update

ROOT = Path(__file__).resolve().parent.parent
PAIR = [str(ROOT / "config" / "translate_messages.py")]
PAIR += ["--optimizer=adamw", "--label_smoothing=0", "--gradient_accumulation_steps=1"]
GPT = ["--task=completion", "--n_layer=4", "--n_head=4", "--n_embd=192", "--block_size=256"]
GPT += ["--norm=rms", "--position=rotary", "--mlp=swiglu", "--batch_size=16"]
GPT += ["--gradient_accumulation_steps=1"]
RATE = 1e-4
NOTHING = {"ids": 0, "targets": NO_TARGET, "segments": 0}  # what fills up the rows of a GPT
Run = Callable[[], None]


def open_task(words: list[str], dataset: str) -> tuple[TrainConfig, Dataset]:
    """The config that the words make, for that dataset, and the dataset."""
    config = load_config(TrainConfig, [*words, f"--dataset={dataset}"])
    return fit_to_task(config, find_dataset(dataset))


def our_updates(state: TrainState, data: list[Batch], engine: Engine) -> Run:
    """An update of nanolm's model on each batch."""

    def run() -> None:
        for batch in data:
            update(state, [batch], learning_rate=RATE, engine=engine)

    return run


def contest_on(engine: Engine, title: str, runs: dict[str, Run], repeats: int) -> dict[str, float]:
    """Median seconds of each, after a turn that does not count."""
    for run in runs.values():
        run()  # compiles, and warms up
    kind = f"{engine.device} float32 {'compiled' if engine.compile else 'uncompiled'}"
    clock: Clock = clock_for(engine.device)
    return contest(f"{title}, {kind}", runs, repeats=repeats, clock=clock)


def size(batch: Batch) -> int:
    """How many tokens a batch has room for."""
    return batch["ids"].size + (batch["source"].size if "source" in batch else 0)


def padding(task: object, data: Iterable[Batch]) -> float:
    """The share of the batches that only fills them up."""
    return 1 - sum(map(task.n_tokens, data)) / sum(map(size, data))


def show(who: str, speed: float, unit: str, empty: float) -> dict[str, float]:
    """Print a contestant's speed and padding, and give them names."""
    print(f"    {who:32} {speed:12,.2f} {unit}   {empty:6.1%} padding")
    return {unit: speed, "padding": empty}


# ------------------------------------------------------------------------------------------
# The encoder-decoder


def their_updates(folder: str, data: list[Batch], device: torch.device) -> Run:
    """An update of transformers' model on each batch."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).to(device).train()

    def loss_of(batch: Batch) -> torch.Tensor:
        source, mask, ids, targets = (
            torch.from_numpy(batch[key]).to(device)
            for key in ("source", "source_mask", "ids", "targets")
        )
        labels = targets.masked_fill(targets == NO_TARGET, -100)
        keys = {"attention_mask": mask.long(), "decoder_input_ids": ids, "labels": labels}
        return model(source, **keys).loss

    return plain_updates(model, data, loss_of, RATE)


def compare_updates(words: list[str], dataset: str, n: int, device: str, repeats: int) -> dict:
    """Updates per second of both."""
    config, data = open_task([*PAIR, *words], dataset)
    engine = choose_engine(
        find_hardware(), device=device, dtype="float32", flops=math.inf, many_shapes=True
    )
    task = make_task(config, data.tokenizer)
    groups = task.groups(data.train, 0)[:n]
    own = [task.gather(data.train, group) for group in groups]
    order = np.random.default_rng(0).permutation(np.concatenate(groups))
    mixed = [task.gather(data.train, group) for group in np.array_split(order, len(groups))]
    torch.manual_seed(0)
    state = build_state(config, task.model(config.model_config()), engine)
    state.model.train()
    layouts = {"transformers, the same batches": own, "transformers, shuffled batches": mixed}
    with TemporaryDirectory() as place:
        theirs = export_model(state.model, data.tokenizer, f"{place}/model")
        runs = {
            who: their_updates(f"{place}/model", batches, engine.device)
            for who, batches in layouts.items()
        }
    runs = {"nanolm": our_updates(state, own, engine), **runs}
    layouts["nanolm"] = own
    tokens = sum(map(task.n_tokens, own)) / len(own)
    title = f"{dataset}, {theirs}: {len(own)} updates of {tokens:,.0f} tokens"
    seconds = contest_on(engine, title, runs, repeats)
    speeds = {who: len(own) / median for who, median in seconds.items()}
    return {
        who: show(who, speed, "updates/s", padding(task, layouts[who]))
        for who, speed in speeds.items()
    }


# ------------------------------------------------------------------------------------------
# Packing


def whole_window(batch: Batch, width: int) -> Batch:
    """The batch with its rows filled up to that width."""
    more = [(0, 0), (0, width - batch["ids"].shape[1])]
    return {name: np.pad(x, more, constant_values=NOTHING[name]) for name, x in batch.items()}


def layouts_of(task: CompletionTask, examples: Examples) -> dict[str, list[Batch]]:
    """All examples in batches of several kinds, each about as many to a batch."""
    rows = [task.gather(examples, group) for group in task.groups(examples, 0)]
    numbers = np.random.default_rng(0).permutation(task.fitting(examples))
    alone = replace(task, pack=False, batch_size=math.ceil(len(numbers) / len(rows)))
    sorted_ones = [alone.gather(examples, group) for group in alone.groups(examples, 0)]
    groups = [[[i] for i in part] for part in np.array_split(numbers, len(rows))]
    longest = [alone.gather(examples, group) for group in groups]
    return {
        "packed": rows,
        "padded, of similar length": sorted_ones,
        "padded to the longest, shuffled": longest,
        "padded to the window, shuffled": [whole_window(x, task.block_size) for x in longest],
    }


def compare_packing(words: list[str], dataset: str, n: int, device: str, repeats: int) -> dict:
    """Tokens with loss per second of each layout."""
    config, data = open_task([*GPT, *words, "--batch_tokens=0"], dataset)
    engine = choose_engine(find_hardware(), device=device, dtype="float32", flops=math.inf)
    task = make_task(config, data.tokenizer)
    chosen = [data.train[i] for i in range(min(n, len(data.train)))]
    found = packed([(ids.tolist(), spans.tolist()) for ids, spans in chosen])
    layouts = layouts_of(task, Examples(found, len(chosen), sum(len(own) for _, own in chosen)))
    torch.manual_seed(0)
    state = build_state(config, task.model(config.model_config()), engine)
    state.model.train()
    runs = {who: our_updates(state, batches, engine) for who, batches in layouts.items()}
    learned = sum(int((batch["targets"] != NO_TARGET).sum()) for batch in layouts["packed"])
    title = f"{dataset}: {len(chosen)} examples, {learned:,} tokens with loss"
    seconds = contest_on(engine, title, runs, repeats)
    return {
        who: show(who, learned / median, "tokens with loss/s", padding(task, layouts[who]))
        for who, median in seconds.items()
    }


def parser() -> ArgumentParser:
    parser = arguments(__doc__.splitlines()[0])
    parts = ("updates", "packing")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--dataset", default="pysummaries", help="of updates")
    parser.add_argument("--updates", type=at_least_1, default=30, help="in a turn")
    parser.add_argument("--chats", default="pyhelp", help="the dataset of packing")
    parser.add_argument("--examples", type=at_least_1, default=1024, help="of it, in a turn")
    parser.add_argument("--device", default="auto")
    return parser


def main(words: list[str]) -> None:
    options, keys = parser().parse_known_args(words)
    knobs = {"device": options.device, "repeats": options.repeats}
    results = {}
    if "updates" in options.parts:
        results["updates"] = compare_updates(keys, options.dataset, options.updates, **knobs)
    if "packing" in options.parts:
        results["packing"] = compare_packing(keys, options.chats, options.examples, **knobs)
    write(options.json, results)


if __name__ == "__main__":
    run_benchmark(main)
