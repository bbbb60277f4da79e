"""What a run would need and take: python -m nanolm.plan CONFIG_FILE --gpus=8 --gpu=h100

Nothing is trained, downloaded or written, but for a picture that is asked for.
"""

from dataclasses import replace

from nanolm.plan.costs import GB, GPUS, USABLE, Costs, PlanConfig, layouts
from nanolm.plan.scaling import draw_scaling
from nanolm.runs.log import duration
from nanolm.runs.start import check_kind
from nanolm.system.config import load_config
from nanolm.system.script import run_script
from nanolm.tasks.table import TASKS
from nanolm.text.data import SEAL, dataset_folder, open_dataset

GPT2 = 50257  # tokens
TWO = ("yes", "no")  # labels: how many there are makes no difference that would show


def completed(config: PlanConfig) -> PlanConfig:
    """The config with what training would take from the dataset and the task."""
    if config.init_from not in ("scratch", "auto", "resume"):
        print(f"shape      that of the keys, and not of {config.init_from}")
    if config.vocab_size is None and (dataset_folder(config.dataset) / SEAL).exists():
        config = replace(config, vocab_size=open_dataset(config.dataset).tokenizer.vocab_size)
    if config.vocab_size is None:
        print(f"vocabulary {GPT2:,} tokens, as GPT-2's; --vocab_size says another")
        config = replace(config, vocab_size=GPT2)
    task = TASKS[config.task]
    if task.kinds == ("an encoder",):
        config = replace(config, causal=False)
    check_kind(config, config.kind, "the config says")
    if head := getattr(task, "head", None):  # one for labels
        config = replace(config, head=head, labels=TWO)
    return config


def row(costs: Costs, config: PlanConfig) -> str:
    """A layout's line of the table."""
    gpu, parts = GPUS[config.gpu], costs.memory().values()
    work, *messages = costs.seconds(gpu, config.utilization)
    times = work, sum(messages), costs.duration(gpu, config.utilization)
    numbers = "".join(f" {part / GB:8.2f}" for part in (*parts, sum(parts)))
    numbers += "".join(f" {time * 1e3:8,.1f}" for time in times)
    fits = "" if costs.fits(gpu) else "  does not fit"
    return f"{costs.layout.flags or 'no flags':52}{numbers}{fits}"


def main(arguments: list[str]) -> None:
    """Print the plan."""
    config = load_config(PlanConfig, arguments)
    config, problems = completed(config), []
    gpu, tokens, dtype = GPUS[config.gpu], config.tokens_per_update, config.precision
    every = layouts(config.gpus, config, problems)
    found = [Costs(config, layout, dtype=dtype) for layout in every]
    first, per_token = found[0], found[0].useful_flops / tokens
    print(f"parameters {first.parameters:,}")
    print(f"tokens     {tokens:,} an update, {tokens * config.max_iters:,} in all")
    total = per_token * tokens * config.max_iters
    print(f"operations {per_token:.3g} a token, {total:.3g} in all")
    print(f"cache      {first.cache() / GB:.3f} GB for a text of {config.block_size} tokens")
    device = f"{config.gpus} x {config.gpu} with {gpu.memory / GB:.0f} GB"
    print(f"on         {device}, {dtype} at {config.utilization:.0%} of {gpu.peak(dtype):.3g}/s")
    heads = "weights grads moments activ. logits all work messages update"
    titles = "".join(f"{head:>9}" for head in heads.split())
    print(f"\n{'memory of each in GB, times in ms':52}{titles}")
    for costs in found:
        print(row(costs, config))
    for problem in dict.fromkeys(problems):
        print(f"left out   {problem}")
    fit = [costs for costs in found if costs.fits(gpu)]
    if not fit:
        raise ValueError(
            f"nothing fits into {USABLE:.0%} of a {config.gpu}: more gpus, a smaller batch_size"
        )
    best = min(fit, key=lambda costs: costs.duration(gpu, config.utilization))
    time = best.duration(gpu, config.utilization) * config.max_iters
    print(f"\ncheapest   {best.layout.flags or 'no flags'}")
    print(f"           {duration(time)} in all, {time * config.gpus / 3600:,.1f} GPU hours")
    if config.picture:
        draw_scaling(config, config.picture)


if __name__ == "__main__":
    run_script(main, "python -m nanolm.plan CONFIG_FILE [--key=value ...]", PlanConfig)
