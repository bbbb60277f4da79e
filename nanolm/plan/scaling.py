"""How a run scales to more GPUs than anyone rents for a try, beside runs that were published."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from nanolm.plan.costs import GPU, GPUS, Costs, Layout, PlanConfig, layouts
from nanolm.runs.settings import TrainConfig
from nanolm.system.files import whole_file

COUNTS = [2**i for i in range(6, 15)]  # 64 to 16,384

# Of llm-foundry's training benchmarks (MosaicML 2023): MPT models, sharded and recomputed, on
# A100s with 200 Gb/s each: (blocks, heads, channels), GPUs, sequences of a micro-batch: what they
# reach.
# They sum gradients in bfloat16; in float32, as here, that takes twice as long.
MPT = TrainConfig(vocab_size=50368, block_size=2048, gradient_accumulation_steps=128)
PUBLISHED = {
    ((40, 40, 5120), 64, 16): 0.5204,
    ((80, 64, 8192), 64, 2): 0.3587,
    ((40, 40, 5120), 128, 16): 0.5193,
    ((48, 56, 7168), 128, 6): 0.5225,
    ((80, 64, 8192), 128, 4): 0.4891,
}
REACHED = 0.7  # of the peak, by the products of these runs, where nothing waits
# Llama 3 405B on H100s (Dubey et al. 2024, table 4), which also cut the model into 16 stages.
LLAMA = {8192: 0.43, 16384: 0.41}


def useful(costs: Costs, gpu: GPU, utilization: float) -> float:
    """The part of the peak that goes into a run's own operations (PaLM's MFU)."""
    peak = costs.layout.replicas * costs.layout.tensor * gpu.peak(costs.dtype)
    return costs.useful_flops / peak / costs.duration(gpu, utilization)


def rates(config: PlanConfig, *, grow: bool) -> dict[int, float]:
    """useful of the fastest layout that fits, by the number of GPUs, of those that can be used.

    grow: whether an update grows with them, to a micro-batch for each; otherwise its sequences are
    dealt out, as evenly as may be.
    """
    gpu, found, before = GPUS[config.gpu], {}, config.gradient_accumulation_steps
    unit = "batch_tokens" if config.batch_tokens else "batch_size"
    for n in COUNTS:
        steps = -(-before // n) * n
        part = 1 if grow else before / steps
        size = int(getattr(config, unit) * part)
        if not size:
            break
        each = replace(config, gradient_accumulation_steps=steps, **{unit: size})
        every = [Costs(each, layout, dtype=config.precision) for layout in layouts(n, each)]
        fit = [costs for costs in every if costs.fits(gpu)]
        if fit:
            found[n] = max(useful(costs, gpu, config.utilization) for costs in fit)
    return found


def published() -> list[tuple[float, int, float, float]]:
    """Of each run of PUBLISHED: its parameters, its GPUs, what is computed, and what it says."""
    found = []
    for ((n_layer, n_head, n_embd), n, size), said in PUBLISHED.items():
        shape = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "n_kv_head": None}
        derived = {"head_size": None, "n_hidden": None}
        config = replace(MPT, **shape, **derived, batch_size=size, gradient_accumulation_steps=n)
        layout = Layout(n, shard=True, recompute=True)
        costs = Costs(config, layout, dtype="bfloat16")
        computed = useful(costs, GPUS["a100"], REACHED)
        found.append((costs.parameters, n, computed, said))
    return found


def draw_scaling(config: PlanConfig, path: str | Path) -> None:
    """Draw the rates of a planned run and those published, and say how far these are met."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("picture: needs matplotlib; pip install matplotlib") from None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for grow, label in ((False, "of one size"), (True, "that grow with them")):
        found = rates(config, grow=grow)
        axes.plot([*found], [*found.values()], "o-", label=f"{config.gpu}: updates {label}")
    pairs = published()
    _, gpus, computed, said = np.transpose(pairs)
    axes.vlines(gpus, computed, said, "C3", linewidth=0.5)
    axes.plot(gpus, computed, "C3+", label="MPT on A100, computed")
    axes.plot(gpus, said, "C3x", label="MPT on A100, published")
    axes.plot([*LLAMA], [*LLAMA.values()], "kx", label="Llama 3 on H100, published")
    axes.set_xscale("log", base=2)
    axes.set_xticks(COUNTS, [f"{n:,}" for n in COUNTS])
    axes.set(xlabel="GPUs", ylabel="model operations, of the peak", ylim=(0, 0.7))
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        with whole_file(Path(path)) as file:
            figure.savefig(file, format="png", dpi=120)
    except OSError as error:
        raise ValueError(f"picture={path}: cannot be written: {error.strerror}") from None
    for size, n, computed, said in pairs:
        words = f"MPT of {size / 1e9:.0f}B parameters on {n} A100s"
        print(f"{words}: {computed:.3f} of the peak computed, {said:.3f} published")
    print(f"picture    {path}")
