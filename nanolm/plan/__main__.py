"""What a run would need and take: python -m nanolm.plan CONFIG_FILE --gpus=8 --gpu=h100

Nothing is trained, downloaded or written, but for a picture that is asked for.
"""

from dataclasses import dataclass, replace

from nanolm.layers import require_at_least, require_choice
from nanolm.plan.costs import GB, GPUS, USABLE, Costs, layouts
from nanolm.plan.scaling import draw_scaling
from nanolm.runs.log import duration
from nanolm.runs.settings import TrainConfig
from nanolm.system.config import load_config
from nanolm.system.script import run_script

GPT2 = 50257  # tokens


@dataclass(frozen=True, kw_only=True)
class PlanConfig(TrainConfig):
    """The keys of a run, and what it is planned for."""

    gpus: int = 8  # how many
    gpu: str = "h100"  # which: see the table in plan/costs.py
    utilization: float = 0.4  # of its peak, what matrix products are expected to reach
    picture: str | None = None  # also draw how the run scales to 16,384 of them, into this file

    def __post_init__(self):
        super().__post_init__()
        require_at_least(self, 1, "gpus")
        require_choice("gpu", self.gpu, GPUS)
        if not 0 < self.utilization <= 1:
            raise ValueError(f"utilization={self.utilization}: must be above 0, at most 1")

    @property
    def width(self) -> str:
        """The precision of matrix products."""
        return "bfloat16" if self.dtype == "auto" else self.dtype


def plans(config: PlanConfig) -> list[Costs]:
    """The costs of all layouts that share the micro-batches evenly."""
    n, found = config.gradient_accumulation_steps, layouts(config.gpus, config)
    even = [layout for layout in found if n % layout.replicas == 0]
    if not even:
        counts = sorted({layout.replicas for layout in found})
        raise ValueError(
            f"gradient_accumulation_steps={n}: {config.gpus} GPUs cannot share them evenly; "
            f"choose a multiple of {' or '.join(map(str, counts))}"
        )
    return [Costs(config, layout, dtype=config.width) for layout in even]


def row(costs: Costs, config: PlanConfig) -> str:
    """A layout's line of the table."""
    gpu, parts = GPUS[config.gpu], costs.memory().values()
    work, *messages = costs.seconds(gpu, config.utilization)
    times = work, sum(messages), costs.duration(gpu, config.utilization)
    numbers = "".join(f"{part / GB:9.2f}" for part in (*parts, sum(parts)))
    numbers += "".join(f"{time * 1e3:9,.0f}" for time in times)
    fits = "" if costs.fits(gpu) else "  does not fit"
    return f"{costs.layout.flags or 'no flags':52}{numbers}{fits}"


def main(arguments: list[str]) -> None:
    """Print the plan."""
    config = load_config(PlanConfig, arguments)
    if config.vocab_size is None:
        print(f"vocabulary {GPT2:,} tokens, as GPT-2's; --vocab_size says another")
        config = replace(config, vocab_size=GPT2)
    found, gpu, tokens = plans(config), GPUS[config.gpu], config.tokens_per_update
    first, per_token = found[0], found[0].useful_flops / tokens
    print(f"parameters {first.parameters:,}")
    print(f"tokens     {tokens:,} an update, {tokens * config.max_iters:,} in all")
    total = per_token * tokens * config.max_iters
    print(f"operations {per_token:.3g} a token, {total:.3g} in all")
    print(f"cache      {first.cache() / GB:.3f} GB for a text of {config.block_size} tokens")
    device = f"{config.gpus} x {config.gpu} with {gpu.memory / GB:.0f} GB"
    print(f"on         {device}, {config.width} at {config.utilization:.0%} of {gpu.flops:.3g}/s")
    heads = "weights grads moments activ. logits all work messages update"
    titles = "".join(f"{head:>9}" for head in heads.split())
    print(f"\n{'memory of each in GB, times in ms':52}{titles}")
    for costs in found:
        print(row(costs, config))
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
