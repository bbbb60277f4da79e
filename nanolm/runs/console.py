"""What a run says of itself on the console, before its first update and after its last."""

from collections.abc import Iterator

import torch

from nanolm.model import count_parameters, flops_per_token
from nanolm.runs.log import best_evaluation, duration, read_metrics, score_words, scores_of
from nanolm.runs.run import Run
from nanolm.runs.settings import TrainConfig
from nanolm.system.config import quoted

# What training reaches on a core of an ordinary CPU, in float32: for a first estimate of its time.
CPU_FLOPS_PER_THREAD = 2e10


def describe(run: Run, source: str) -> None:
    """Say what is about to happen, and why so. source: where the run starts from."""
    config = run.config
    print(f"run       {run.folder}, {source}")
    describe_engine(run)
    first, *facts = run.task.facts(run.dataset)
    for line in (f"data      {run.dataset.folder}: {first}", *(f"          {f}" for f in facts)):
        print(line)
    print(f"model     {count_parameters(run.state.model):,} parameters")
    if not config.eval_only:
        describe_work(run)


def describe_engine(run: Run) -> None:
    """Say where the run computes, and why there."""
    engine = run.engine
    names = (engine.device, engine.dtype, "compiled" if engine.compile else "not compiled")
    labels = ("device", "precision", "compile")
    for label, name, reason in zip(labels, names, engine.reasons, strict=True):
        print(f"{label:9} {name} ({reason})")
    if run.world.size > 1:
        world = run.world
        n = run.config.gradient_accumulation_steps // world.replicas
        how = "each of which holds the model"
        if world.splits:
            split = f"groups of {world.tensor} that split matrices"
            ways = [split] * (world.tensor > 1) + ["shards of the model"] * world.shard
            how = f"with {' and '.join(ways)}"
        print(f"processes {world.size}, {how}, and {n} of an update's micro-batches each")


def describe_work(run: Run) -> None:
    """Say how much there is to do, and what the losses on the console are."""
    config, step = run.config, run.state.step
    n = config.gradient_accumulation_steps
    epochs = config.max_iters * n / run.task.batches_per_epoch(run.dataset)
    print(f"updates   {config.max_iters:,} of {run.task.amount(n)} each: {epochs:.2f} epochs")
    print(
        "loss      of an update: on its own batch, before the weights change; "
        "train and val: on fixed batches"
    )
    for name, value in run.task.baselines(run.dataset).items():
        print(f"          {name} = {value:.4f}")
    for oddity in oddities(config) if config.decay_lr and config.max_iters else ():
        print(f"warning   {oddity}")
    flops = flops_per_token(run.state.model) * config.tokens_per_update * (config.max_iters - step)
    seconds = flops / (CPU_FLOPS_PER_THREAD * torch.get_num_threads())
    if run.engine.device_type == "cpu" and seconds > 3600:
        print(
            f"warning   this run takes a CPU like this one about {duration(seconds)}; "
            "config/shakespeare_cpu.py and config/pydocs.py are made for CPUs"
        )


def oddities(config: TrainConfig) -> Iterator[str]:
    """What nobody may have meant in a learning rate that is to rise and to fall."""
    if config.max_iters <= config.warmup_iters:
        yield (
            f"the rate never reaches {config.learning_rate:g}: warmup_iters="
            f"{config.warmup_iters} is as long as the run, or longer"
        )
    if 2 * config.min_lr > config.learning_rate:
        yield (
            f"the rate hardly falls: min_lr={config.min_lr:g} is close to learning_rate="
            f"{config.learning_rate:g}"
        )
    if (config.lr_decay_iters or 0) > config.max_iters:
        yield (
            f"the rate ends at {config.rate(config.max_iters):.3g}, above min_lr: lr_decay_iters="
            f"{config.lr_decay_iters} lies behind max_iters={config.max_iters}"
        )


def describe_end(run: Run, seconds: float) -> None:
    """Say what came out, and how to use it."""
    share = run.log.evaluations_took / seconds if run.log else 0.0
    print(f"done      in {duration(seconds)}, evaluations {share:.0%} of it")
    rows = read_metrics(run.log.path) if run.log else []
    if best := best_evaluation(rows, run.config):
        words = score_words({"validation_loss": best["val_loss"], **scores_of(best)})
        print(f"best      step {best['step']}: {', '.join(words)}")
    command = f"python sample.py --out_dir={quoted(run.folder)}{run.task.asks}"
    print(f"          {'sample from it' if run.task.continues else 'try it'} with: {command}")
