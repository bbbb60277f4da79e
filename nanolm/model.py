"""The model: a decoder-only Transformer that turns token ids into a guess at each next token.

Ids become vectors; N blocks add what attention and an MLP make of them (He et al. 2015: a sum, so
that gradients pass through); the last vector of each position is compared with every token's
embedding. Each block normalizes its input first ("pre-norm", Xiong et al. 2020), which trains
without care:

    x = x + attention(norm(x))
    x = x + mlp(norm(x))

The parts that people argue about are looked up by name, so that GPT-2 (Radford et al. 2019) and a
modern model are two configurations of one class:

    norm       layer: (x - mean) / std * weight + bias      rms: x / rms(x) * weight
    position   learned: a vector per position   sinusoidal: waves   rotary: inside attention
    mlp        gelu: down(gelu(up x))   relu2: down(relu(up x)^2)
               swiglu: down(silu(gate x) * up x)

The model knows nothing of optimizers, files, devices or processes.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanolm.attention import KVCache, MultiHeadAttention, RMSNorm, rotary_angles
from nanolm.loss import projected_cross_entropy


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a GPT. The defaults are GPT-2's (124M) but for its biases, as in nanoGPT."""

    vocab_size: int = 50257  # tokens that can be told apart
    block_size: int = 1024  # longest context, in tokens
    n_layer: int = 12  # blocks
    n_head: int = 12  # query heads
    n_embd: int = 768  # channels of the residual stream
    dropout: float = 0.0  # probability that an activation is dropped in training
    bias: bool = False  # biases in linear layers and layer norms
    norm: str = "layer"  # layer | rms
    norm_eps: float = 1e-5  # added to the variance, against division by zero
    position: str = "learned"  # learned | sinusoidal | rotary
    rope_theta: float = 10000.0  # base of the rotary frequencies
    mlp: str = "gelu"  # gelu | swiglu | relu2
    n_hidden: int | None = None  # channels inside the MLP; None: 4 n_embd (swiglu: 8/3 n_embd)
    n_kv_head: int | None = None  # key/value heads; None: n_head
    head_size: int | None = None  # channels of a head; None: n_embd / n_head
    qk_norm: bool = False  # RMS-normalize queries and keys
    tie_embeddings: bool = True  # output layer = input embedding (Press & Wolf 2017)

    def __post_init__(self):
        sizes = "vocab_size block_size n_layer n_head n_embd n_hidden n_kv_head head_size"
        require_at_least(self, 1, sizes)
        require_fraction(self, "dropout")
        for key in ("norm_eps", "rope_theta"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key}={getattr(self, key)}: must be above 0")
        require_choice("norm", self.norm, NORMS)
        require_choice("position", self.position, POSITIONS)
        require_choice("mlp", self.mlp, MLPS)
        self._fill_in()
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head={self.n_kv_head}: must divide n_head={self.n_head}")
        if self.position == "rotary" and self.head_size % 2:
            raise ValueError(f"head_size={self.head_size}: position='rotary' needs an even one")

    def _fill_in(self):
        """Replace each None by what follows from other keys: a config says all of its shape."""
        if self.head_size is None and self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: "
                "change one of them, or give head_size"
            )
        gated = math.ceil(self.n_embd * 8 / 3 / 64) * 64  # as many weights as ungated
        derived = {
            "head_size": self.n_embd // self.n_head,
            "n_kv_head": self.n_head,
            "n_hidden": gated if self.mlp == "swiglu" else 4 * self.n_embd,
        }
        for key, value in derived.items():
            if getattr(self, key) is None:
                object.__setattr__(self, key, value)  # the dataclass is frozen for everyone else


def require_at_least(config: object, minimum: float, keys: str) -> None:
    """Raise ValueError for the first of the keys (words of a string) that is below the minimum."""
    for key in keys.split():
        value = getattr(config, key)
        if value is not None and value < minimum:
            raise ValueError(f"{key}={value}: must be at least {minimum}")


def require_fraction(config: object, keys: str) -> None:
    """Raise ValueError for the first of the keys that is not at least 0 and below 1."""
    for key in keys.split():
        if not 0 <= getattr(config, key) < 1:
            raise ValueError(f"{key}={getattr(config, key)}: must be at least 0 and below 1")


def require_choice(key: str, value: str, choices: Iterable[str]) -> None:
    """Raise ValueError for a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{key}={value!r}: choose one of {', '.join(choices)}")


class MLP(nn.Module):
    """down(activation(up x)): each position by itself (Vaswani et al. 2017, section 3.3)."""

    def __init__(self, config: ModelConfig, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(config.n_embd, config.n_hidden, bias=config.bias)
        self.down = nn.Linear(config.n_hidden, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class GatedMLP(MLP):
    """down(activation(gate x) * up x): the gate says how much of each channel (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, activation: Callable[[Tensor], Tensor]):
        super().__init__(config, activation)
        self.gate = nn.Linear(config.n_embd, config.n_hidden, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


def gelu(x: Tensor) -> Tensor:
    """x Phi(x), Phi being the normal distribution, in the tanh form that GPT-2 uses.

    Hendrycks & Gimpel 2016, section 2.
    """
    return F.gelu(x, approximate="tanh")


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2 (So et al. 2021)."""
    return F.relu(x).square()


def layer_norm(config: ModelConfig) -> nn.Module:
    """Mean 0, variance 1 over the channels, then a learned scale and shift (Ba et al. 2016)."""
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


def rms_norm(config: ModelConfig) -> nn.Module:
    """Root mean square 1 over the channels, then a learned scale (Zhang & Sennrich 2019)."""
    return RMSNorm(config.n_embd, eps=config.norm_eps)


def sinusoids(length: int, n_embd: int) -> Tensor:
    """A wave per pair of channels: sin and cos of pos / 10000^(2i / C) at channels 2i and 2i + 1.

    Returns (length, n_embd). Vaswani et al. 2017, section 3.5.
    """
    positions = torch.arange(length).float()[:, None]  # (length, 1)
    frequencies = 10000.0 ** (-torch.arange(0, n_embd, 2).float() / n_embd)  # (ceil(C / 2),)
    waves = torch.stack(((positions * frequencies).sin(), (positions * frequencies).cos()), dim=-1)
    return waves.flatten(1)[:, :n_embd]  # interleaved; an odd width loses the last cosine


NORMS = {"layer": layer_norm, "rms": rms_norm}
MLPS = {
    "gelu": partial(MLP, activation=gelu),
    "swiglu": partial(GatedMLP, activation=F.silu),  # silu(x) = x sigmoid(x)
    "relu2": partial(MLP, activation=relu2),
}
POSITIONS = ("learned", "sinusoidal", "rotary")


class Block(nn.Module):
    """Attention, then an MLP, each added to the residual stream after a norm of its input."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attn_norm = NORMS[config.norm](config)
        self.attn = MultiHeadAttention(
            config.n_embd,
            config.n_head,
            n_kv_head=config.n_kv_head,
            head_size=config.head_size,
            bias=config.bias,
            dropout=config.dropout,
            qk_norm=config.qk_norm,
            norm_eps=config.norm_eps,
        )
        self.mlp_norm = NORMS[config.norm](config)
        self.mlp = MLPS[config.mlp](config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor] | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """x: (B, T, C) -> (B, T, C); angles and cache as in MultiHeadAttention."""
        x = x + self.dropout(self.attn(self.attn_norm(x), angles=angles, cache=cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class GPT(nn.Module):
    """Token ids -> logits of each next token, or the mean loss against given targets."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        C, T = config.n_embd, config.block_size
        self.tokens = nn.Embedding(config.vocab_size, C)
        # Positions: one of three, and only the learned one has weights. Buffers are not saved.
        if config.position == "learned":
            self.positions = nn.Embedding(T, C)
        elif config.position == "sinusoidal":
            self.register_buffer("waves", sinusoids(T, C), persistent=False)
        else:
            cos, sin = rotary_angles(torch.arange(T), config.head_size, config.rope_theta)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = NORMS[config.norm](config)
        self.head = nn.Linear(C, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.tokens.weight
        init_weights(self)

    def forward(
        self, ids: Tensor, targets: Tensor | None = None, *, cache: list[KVCache] | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits of each next token, (logits, None); or with targets their loss, (None, loss).

        ids, targets: (B, T) integers; logits: (B, T, V). The loss is the fp32 mean over the
        targets that are not -1, and 0 where there is none. With a cache (see new_cache) the ids
        continue those it holds, and it grows by them. Raises ValueError where the context would
        be longer than block_size.
        """
        start = cache[0].length if cache else 0
        end = start + ids.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"a context of {end} tokens: block_size is {self.config.block_size}")
        x, angles = self.tokens(ids), None  # (B, T, C)
        if self.config.position == "learned":
            x = x + self.positions.weight[start:end]
        elif self.config.position == "sinusoidal":
            x = x + self.waves[start:end]
        else:
            angles = self.cos[start:end], self.sin[start:end]
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            x = block(x, angles, cache[i] if cache else None)
        x = self.norm(x)
        if targets is None:
            return self.head(x), None  # (B, T, V)
        return None, projected_cross_entropy(x, self.head.weight, targets)

    def new_cache(self, length: int | None = None) -> list[KVCache]:
        """An empty cache for forward: one KVCache per layer, with room for block_size tokens.

        length: fewer tokens, for less memory.
        """
        return [KVCache(length or self.config.block_size) for _ in self.blocks]


@torch.no_grad()
def init_weights(model: GPT) -> None:
    """Draw the weights as GPT-2 does: normal, std 0.02; biases 0; norms 1 (Radford et al. 2019).

    The layers that write into the residual stream start smaller, by 1 / sqrt(2 n_layer), so that
    the sum of all blocks starts with the variance of one.
    """
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            writes_residual = name.endswith(("attn.out", "mlp.down"))
            std = 0.02 / math.sqrt(2 * model.config.n_layer) if writes_residual else 0.02
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def count_parameters(model: nn.Module) -> int:
    """How many numbers training changes; a shared tensor counts once."""
    return sum(p.numel() for p in model.parameters())
