"""The costs of an update: memory of each process, operations, and what processes tell each other.

With P parameters, L blocks of C channels, a attention heads of A channels in all, K channels of
keys, F inside the MLP, V tokens in the vocabulary, micro-batches of B sequences of T tokens, w
bytes for a number in a matrix product (4, or 2 in bfloat16), bytes per process are:

    weights, gradients   4 P each; in bfloat16 2 P more, of copies; 4 P more of DDP's buckets
    optimizer            8 P of AdamW and LAMB, 4 P of SGD; of Muon 4 for each hidden weight
    activations          B T (L block + 4 C + w C)
        block            8 C + w (2 C + A + F) + w (A + 2 K) + MLP + attention + dropout
        MLP              w F (gated: 3 w F)
        attention        fused: w A + 4 a; by the formula, as where dropout falls on heads that
                         are split: 4 a T, and in bfloat16 w a T more, or with dropout (4 + w) a T
    logits               12 B T V (masked: hidden tokens alone); in chunks (8 + w) for each of a
                         chunk, and 4 C (B T + V)
    cache                2 w L K for each token of a text that is sampled

in the manner of Korthikanti et al. 2022 (Reducing Activation Recomputation in Large Transformer
Models, section 4), for these layers and precisions. A block that is computed again keeps 4 C, and
one of them is whole at a time. Shards divide the first three by their number (Rajbhandari et al.
2020, ZeRO, section 5), but hold some blocks, and the embeddings, whole. Split matrices divide
their part of these, and all of a block but 8 C + 2 w C. A gradient comes when its activation
goes; so the two only add up where gradients are kept from one micro-batch to the next.

Operations are 6 per parameter and token, and those of attention (Hoffmann et al. 2022, appendix F,
count the same; see model.flops_per_token): a forward pass is a third, and recomputing is one more.

A ring of n processes sends (n - 1) / n of what it gathers, or of what it sums and scatters; to sum
it for all is both. Per update replicas sum 4 P, shards gather w P twice and sum 4 P in each
micro-batch, and split matrices sum w B T C four times in each block.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch

from nanolm.attention import prefer_formula
from nanolm.layers import GatedMLP, ModelConfig, require_at_least, require_choice
from nanolm.loss import CHUNK
from nanolm.model import Tower, Transformer, build_model, count_parameters, flops_per_token
from nanolm.optim import parameter_groups, wide
from nanolm.parallel import World
from nanolm.parts import PLANS, WHOLE
from nanolm.precision import DTYPES, Engine
from nanolm.runs.settings import TrainConfig
from nanolm.runs.start import check_layout, check_split

PER_MACHINE = 8  # GPUs
USABLE = 0.92  # of a GPU's memory: the rest is what CUDA, its libraries and gaps take
COPIES = 5  # of a stack of matrices, while Muon makes them orthogonal
OVERLAP = 2 / 3  # of the work: the backward pass, beside which gradients and shards travel
GB = 1e9


@dataclass(frozen=True)
class GPU:
    """What is known of a device. Bandwidths are bytes per second in one direction."""

    flops: float  # of matrix products in bfloat16
    memory: float  # bytes
    near: float  # to those of the same machine
    far: float  # to other machines, for each GPU

    def peak(self, dtype: str) -> float:
        """Operations per second of matrix products; in TF32, which float32 takes, half as many."""
        return self.flops / (2 if dtype == "float32" else 1)


# From NVIDIA's data sheets; far: a network card of 400 Gb/s (A100: 200, RTX: 100 for the machine).
GPUS = {
    "b200": GPU(2250e12, 180e9, 900e9, 50e9),
    "h200": GPU(989e12, 141e9, 450e9, 50e9),
    "h100": GPU(989e12, 80e9, 450e9, 50e9),
    "a100": GPU(312e12, 80e9, 300e9, 25e9),
    "rtx4090": GPU(165e12, 24e9, 25e9, 1.6e9),
}


@dataclass(frozen=True, kw_only=True)
class PlanConfig(TrainConfig):
    """The keys of a run, and what it is planned for."""

    gpus: int = 8  # how many
    gpu: str = "h100"  # which: see GPUS in plan/costs.py
    utilization: float = 0.4  # of its peak, what matrix products are expected to reach
    picture: str | None = None  # also draw how the run scales to 16,384 of them, into this file

    def __post_init__(self):
        super().__post_init__()
        require_at_least(self, 1, "gpus")
        require_choice("gpu", self.gpu, GPUS)
        require_choice("dtype", self.dtype, ("auto", *DTYPES))
        require_choice("compile", str(self.compile), ("auto", "True", "False"))
        if self.picture and not self.picture.endswith(".png"):
            raise ValueError(f"picture={self.picture}: the name of a PNG, as scaling.png")
        if not 0 < self.utilization <= 1:
            raise ValueError(f"utilization={self.utilization}: must be above 0, at most 1")

    @property
    def precision(self) -> str:
        """That of matrix products."""
        return "bfloat16" if self.dtype == "auto" else self.dtype


@dataclass(frozen=True)
class Layout:
    """How processes hold a model (see parallel.py)."""

    replicas: int = 1
    tensor: int = 1
    shard: bool = False
    recompute: bool = False

    @property
    def flags(self) -> str:
        """The words of the command line that ask for it."""
        words = ["--shard=true"] * self.shard + ["--recompute=true"] * self.recompute
        return " ".join(words + [f"--tensor_parallel={self.tensor}"] * (self.tensor > 1))


def layouts(gpus: int, config: TrainConfig, problems: list[str] | None = None) -> list[Layout]:
    """All layouts of so many processes that training accepts; split matrices stay on a machine.

    Those alone that the config asks for, where it names a part of one. problems: a list that gets
    what training says of the others. Raises ValueError with that where no layout is left.
    """
    found, together = [], min(gpus, PER_MACHINE)
    problems = [] if problems is None else problems
    engine = Engine("cuda", config.dtype, compile=config.compile is True)
    groups = [n for n in range(1, together + 1) if together % n == 0]
    if config.tensor_parallel > 1:
        groups = [config.tensor_parallel]
    shared = (True,) if config.shard else (False, True)
    again = (True,) if config.recompute else (False, True)
    for tensor, shard, recompute in product(groups, shared, again):
        world = World(size=gpus, shard=shard, tensor=tensor)
        try:
            check_layout(config, world)
            check_split(config, engine, world)
        except ValueError as error:
            if shard or tensor == 1:  # otherwise sharding is what is missing
                problems.append(str(error))
            continue
        found.append(Layout(world.replicas, tensor, shard and world.replicas > 1, recompute))
    if not found:
        raise ValueError(problems[0])
    return list(dict.fromkeys(found))  # a process that is alone has nothing to share


class Costs:
    """The costs of one layout of a run.

    config: with a vocabulary. dtype: of matrix products. device: cuda or cpu.
    """

    def __init__(self, config: TrainConfig, layout: Layout, *, dtype: str, device: str = "cuda"):
        self.model = shapes_of(config.model_config())
        self.config, self.layout, self.dtype, self.device = config, layout, dtype, device
        self.width, T = DTYPES[dtype].itemsize, config.block_size
        formula = prefer_formula(device, DTYPES[dtype], T, config.dropout)
        self.fused = not formula and not (config.dropout and layout.tensor > 1)
        self.micro_batches = max(1, config.gradient_accumulation_steps // layout.replicas)
        tokens = config.batch_tokens or config.batch_size * config.block_size
        self.tokens = tokens  # of a micro-batch
        self.guessed = tokens * (config.mask_fraction if config.task == "masked" else 1)
        self.parameters, self.blocks = count_parameters(self.model), tower_blocks(self.model)
        self.chunk = CHUNK[device]
        at_once = self.guessed * config.vocab_size <= self.chunk or dtype == "float16"
        self.in_chunks = config.head == "tokens" and not (at_once and layout.tensor == 1)

    def share(self, model: torch.nn.Module) -> float:
        """How many of a model's parameters a process has, before they are sharded."""
        total = 0.0
        for name, p in model.named_parameters():
            layer, kind = name.split(".")[-2:]
            weight, bias = PLANS.get(layer, WHOLE)
            split = (bias if kind == "bias" else weight).is_shard()
            total += p.numel() / (self.layout.tensor if split else 1)
        return total

    def memory(self) -> dict[str, float]:
        """Bytes of a process by part, at the peak of an update."""
        layout, config = self.layout, self.config
        own, shares = self.share(self.model), [self.share(block) for block in self.blocks]
        block, rest = max(shares), own - sum(shares)
        kept = own / (layout.replicas if layout.shard else 1)
        sharded = layout.shard and layout.replicas > 1
        gathered = (self.width * 2 * block + 4 * rest) * sharded
        traveling = 4 * (block + rest) * sharded
        buckets = 4 * kept * (layout.replicas > 1 and not sharded)  # what replicas sum, in DDP
        before = 0.0  # of an earlier micro-batch, beside those of this one
        if self.micro_batches > 1:
            before = 4 * kept + 4 * rest * (not sharded and not self.in_chunks)
        gone = 4 * kept + traveling  # when all activations are
        narrow = 0.0  # copies in bfloat16, which the graph of a forward pass keeps
        if self.width < 4 and not sharded:
            narrow = 2 * (block if layout.recompute else own)
        activations, logits = self.activations(), self.logits()
        passing = activations + logits  # what is there in the passes, and not in the step
        per_weight, step = 4 if config.optimizer == "sgd" else 8, 0.0
        if config.optimizer == "muon":
            hidden = parameter_groups(self.model, 0.1, "muon")[-1]["params"]
            per_weight -= 4 * sum(p.numel() for p in hidden) / self.parameters
            alike = Counter()  # matrices of one shape are stacked; parts of them go one by one
            for i, p in enumerate(hidden):
                alike[wide(p).shape, i * (layout.tensor > 1 or gathered > 0)] += p.numel()
            step = 4 * COPIES * max(alike.values()) + 4 * kept
        return {
            "weights": 4 * kept + gathered + narrow,
            "gradients": max(before + buckets + traveling, gone - passing, step - passing),
            "optimizer": per_weight * kept,
            "activations": activations,
            "logits": logits,
        }

    def activations(self) -> float:
        """Bytes that the forward pass of a micro-batch keeps for the backward pass."""
        config, w = self.config, self.width
        each = [self.block(block) for block in self.blocks]
        ends = self.tokens * (4 + w) * config.n_embd
        if not self.layout.recompute:
            return self.tokens * sum(each) + ends
        one = max(0.0, self.tokens * max(each) - self.logits())  # when these are gone
        return self.tokens * 4 * config.n_embd * len(self.blocks) + one + ends

    def block(self, block: torch.nn.Module) -> float:
        """Bytes that a block keeps for each token."""
        config, n, w = self.config, self.layout.tensor, self.width
        C, F, heads = config.n_embd, config.n_hidden, config.n_head
        A, K = heads * config.head_size, config.n_kv_head * config.head_size
        dropped, mask = bool(config.dropout), 1 if self.device == "cuda" else 4
        if self.fused:
            attention = w * A + 4 * heads
        else:
            S = config.block_size
            attention = heads * S * (4 + dropped * (4 + w) + (w < 4 and not dropped) * w)
        gated = isinstance(block.mlp, GatedMLP)
        keys = A if K < A and not self.fused else K  # repeated for each query head
        looks = 1 + hasattr(block, "cross")
        split = looks * (w * (A + A + 2 * keys) + attention) + w * F * (4 if gated else 2)
        twice = 1 + (self.device == "cpu")  # an RMSNorm of several steps keeps one of these, too
        split += looks * twice * w * (A + K) * config.qk_norm
        norm = 4 * C * (twice if config.norm == "rms" else 1)
        whole = (1 + looks) * (norm + w * C + dropped * mask * C)
        return whole + split / n

    def logits(self) -> float:
        """Bytes that the loss takes while all activations are there."""
        config, w = self.config, self.width
        V = config.vocab_size / self.layout.tensor
        if config.head != "tokens":
            return 0.0
        if not self.in_chunks:
            return self.guessed * V * 12
        return (8 + w) * min(self.chunk, self.guessed * V) + 4 * config.n_embd * (self.guessed + V)

    def cache(self) -> float:
        """Bytes of the keys and values of a text of block_size tokens that is sampled."""
        config = self.config
        K = config.n_kv_head * config.head_size / self.layout.tensor
        return 2 * self.width * config.n_layer * K * config.block_size

    def total(self) -> float:
        """Bytes of a process, in all."""
        return sum(self.memory().values())

    def fits(self, gpu: GPU) -> bool:
        """Whether a process has room for it."""
        return self.total() <= USABLE * gpu.memory

    @property
    def useful_flops(self) -> float:
        """Operations of an update, in all processes, without those that are done again."""
        return flops_per_token(self.model) * self.config.tokens_per_update

    def seconds(self, gpu: GPU, utilization: float) -> tuple[float, float, float]:
        """Of an update: its work, what replicas and shards tell each other, what splits do."""
        layout, w = self.layout, self.width
        n, t = layout.replicas, layout.tensor
        again = 4 / 3 if layout.recompute else 1
        work = self.useful_flops * again / (n * t * gpu.peak(self.dtype) * utilization)
        own = self.share(self.model)
        sent = 2 * 4 * own if not layout.shard else self.micro_batches * (2 * w + 4) * own
        speed = gpu.near if n * t <= PER_MACHINE else gpu.far
        between = sent * (n - 1) / n / speed
        sums = 4 * len(self.blocks) * self.micro_batches * self.tokens * self.config.n_embd * w
        within = 2 * sums * (t - 1) / t / (gpu.near if t <= PER_MACHINE else gpu.far)
        return work, between, within

    def duration(self, gpu: GPU, utilization: float) -> float:
        """Seconds of an update: what replicas tell each other hides behind the backward pass."""
        work, between, within = self.seconds(gpu, utilization)
        return work + max(0.0, between - OVERLAP * work) + within


@cache
def shapes_of(config: ModelConfig) -> Transformer:
    """The model of that shape, without its weights."""
    with torch.device("meta"):
        return build_model(config)


def tower_blocks(model: Transformer) -> list[torch.nn.Module]:
    """The blocks of a model, those of an encoder beside it included."""
    return [b for tower in model.modules() if isinstance(tower, Tower) for b in tower.blocks]
