"""The layers of a Transformer, and the one block that they make.

A block adds what attention and an MLP make of its input (He et al. 2015: a sum, so that gradients
pass through). It normalizes the input of each first ("pre-norm", Xiong et al. 2020), which trains
without care; or the sum ("post-norm", Vaswani et al. 2017), as BERT does:

    x = x + attention(norm(x))        x = norm(x + attention(x))
    x = x + mlp(norm(x))              x = norm(x + mlp(x))

Between the two, the decoder of a pair looks at what its encoder has made of another text.

The parts that people argue about are looked up by name, so that GPT-2 (Radford et al. 2019) and a
modern model are two configurations of one class:

    norm       layer: (x - mean) / std * weight + bias      rms: x / rms(x) * weight
    position   learned: a vector per position   sinusoidal: waves   rotary: inside attention
    mlp        gelu, gelu_erf: down(gelu(up x))   relu2: down(relu(up x)^2)
               relu, silu: down(max(0, up x)), down(silu(up x))
               swiglu: down(silu(gate x) * up x)
"""

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanolm.attention import KVCache, Linear, MultiHeadAttention, drop


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a model. The defaults are GPT-2's (124M) but for its biases, as in nanoGPT."""

    vocab_size: int = 50257  # tokens that can be told apart
    block_size: int = 1024  # longest context, in tokens
    n_layer: int = 12  # blocks
    n_head: int = 12  # query heads
    n_embd: int = 768  # channels of the residual stream
    dropout: float = 0.0  # probability that an activation is dropped in training
    bias: bool = False  # biases in linear layers and layer norms
    norm: str = "layer"  # what keeps activations at one scale
    norm_eps: float = 1e-5  # added to the variance, against division by zero
    position: str = "learned"  # how it knows the order of tokens
    rope_theta: float = 10000.0  # base of the rotary frequencies
    mlp: str = "gelu"  # the other half of a block
    n_hidden: int | None = None  # channels inside the MLP; None: 4 n_embd (swiglu: 8/3 n_embd)
    n_kv_head: int | None = None  # key/value heads; None: n_head
    head_size: int | None = None  # channels of a head; None: n_embd / n_head
    qk_norm: bool = False  # RMS-normalize queries and keys
    tie_embeddings: bool = True  # output layer = input embedding (Press & Wolf 2017)
    causal: bool = True  # False: each token sees all others, as in an encoder
    n_encoder_layer: int = 0  # blocks of an encoder that the decoder looks at; 0: there is none
    start_id: int = 0  # with an encoder: the token before a text's first (set by the task)
    scale_embeddings: bool = False  # multiply embeddings by sqrt(n_embd)
    label_smoothing: float = 0.0  # in training, so much of each target is spread over all tokens
    norm_first: bool = True  # False: normalize each sum, and not what is added
    n_types: int = 0  # parts of a text that have an embedding of their own (BERT: 2); 0: none
    head: str = "tokens"  # what the model gives a label: tokens | text | words (set by the task)
    labels: tuple[str, ...] = ()  # their names, where they are no tokens (set by the dataset)

    def __post_init__(self):
        sizes = "vocab_size block_size n_layer n_head n_embd n_hidden n_kv_head head_size"
        require_at_least(self, 1, sizes)
        require_at_least(self, 0, "n_types n_encoder_layer start_id")
        require_fraction(self, "dropout label_smoothing")
        for key in ("norm_eps", "rope_theta"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key}={getattr(self, key)}: must be above 0")
        for key, allowed in self.choices().items():
            require_choice(key, getattr(self, key), allowed)
        self._fill_in()
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head={self.n_kv_head}: must divide n_head={self.n_head}")
        if self.position == "rotary" and self.head_size % 2:
            raise ValueError(f"head_size={self.head_size}: position='rotary' needs an even one")
        if self.n_encoder_layer and not (self.causal and self.head == "tokens"):
            raise ValueError(
                f"n_encoder_layer={self.n_encoder_layer}: goes with a decoder, causal=True, that "
                "writes tokens"
            )
        if self.n_encoder_layer and self.vocab_size and self.start_id >= self.vocab_size:
            raise ValueError(f"start_id={self.start_id}: must be below {self.vocab_size}")

    @property
    def kind(self) -> str:
        """Which of the three models it is, in words."""
        if self.n_encoder_layer:
            return "an encoder-decoder"
        return "a decoder" if self.causal else "an encoder"

    @staticmethod
    def choices() -> dict[str, Collection[str]]:
        """What the keys that name something may be."""
        return {"norm": NORMS, "position": POSITIONS, "mlp": MLPS, "head": HEADS}

    def _fill_in(self):
        """Replace each None by what follows from other keys: a config says all of its shape."""
        if self.head_size is None and self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: "
                "change one of them, or give head_size"
            )
        derived = {
            "head_size": self.n_embd // self.n_head,
            "n_kv_head": self.n_head,
            "n_hidden": MLPS[self.mlp].func.hidden_size(self.n_embd),
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

    @staticmethod
    def hidden_size(n_embd: int) -> int:
        """How many channels it has inside, unless told otherwise."""
        return 4 * n_embd

    def __init__(self, config: ModelConfig, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.activation = activation
        self.up = Linear(config.n_embd, config.n_hidden, bias=config.bias)
        self.down = Linear(config.n_hidden, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class GatedMLP(MLP):
    """down(activation(gate x) * up x): the gate says how much of each channel (Shazeer 2020)."""

    @staticmethod
    def hidden_size(n_embd: int) -> int:
        """Two thirds of an ungated one, in multiples of 64: about as many weights."""
        return math.ceil(n_embd * 8 / 3 / 64) * 64

    def __init__(self, config: ModelConfig, activation: Callable[[Tensor], Tensor]):
        super().__init__(config, activation)
        self.gate = Linear(config.n_embd, config.n_hidden, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


def gelu(x: Tensor) -> Tensor:
    """x Phi(x), Phi being the normal distribution, in the tanh form that GPT-2 uses.

    Hendrycks & Gimpel 2016, section 2.
    """
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    # Written out, (1 + tanh u) / 2 is the sigmoid of 2 u, which takes less time.
    return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))


def gelu_erf(x: Tensor) -> Tensor:
    """x Phi(x) itself, as BERT has it (Hendrycks & Gimpel 2016, section 2)."""
    return F.gelu(x)


def relu(x: Tensor) -> Tensor:
    """max(x, 0), as in the first Transformer (Vaswani et al. 2017, eq. 2)."""
    return F.relu(x)


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2 (So et al. 2021)."""
    return F.relu(x).square()


class LayerNorm(nn.LayerNorm):
    """(x - mean) / sqrt(var + eps) * weight + bias, over the last axis (Ba et al. 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        # A weight may be narrower than x, and PyTorch's kernel wants them alike.
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis (Zhang & Sennrich 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        # Under autocast x may be narrower than the weight, and PyTorch's kernel wants them alike.
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Dropout(nn.Dropout):
    """drop, in training (Srivastava et al. 2014)."""

    def forward(self, x: Tensor) -> Tensor:
        return drop(x, self.p) if self.training else x


def layer_norm(config: ModelConfig) -> nn.Module:
    """Mean 0, variance 1 over the channels, then a learned scale and shift (Ba et al. 2016)."""
    return LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


def rms_norm(config: ModelConfig) -> nn.Module:
    """Root mean square 1 over the channels, then a learned scale (Zhang & Sennrich 2019)."""
    return RMSNorm(config.n_embd, eps=config.norm_eps)


def sinusoids(length: int, n_embd: int) -> Tensor:
    """Waves of C / 2 lengths: the sines of pos / 10000^(2i / C), then their cosines.

    Returns (length, n_embd). Vaswani et al. 2017, section 3.5; in halves as in their program, and
    not in turns as in their text: the order of channels means nothing.
    """
    positions = torch.arange(length, dtype=torch.float64)[:, None]  # (length, 1)
    angles = positions * 10000.0 ** (-torch.arange(0, n_embd, 2).double() / n_embd)
    waves = torch.cat((angles.sin(), angles.cos()), dim=1)  # (length, 2 ceil(C / 2))
    return waves[:, :n_embd].float()  # an odd width loses the last cosine


NORMS = {"layer": layer_norm, "rms": rms_norm}
MLPS = {
    "gelu": partial(MLP, activation=gelu),
    "gelu_erf": partial(MLP, activation=gelu_erf),
    "swiglu": partial(GatedMLP, activation=F.silu),
    "relu": partial(MLP, activation=relu),
    "relu2": partial(MLP, activation=relu2),
    "silu": partial(MLP, activation=F.silu),  # silu(x) = x sigmoid(x)
}
POSITIONS = ("learned", "sinusoidal", "rotary")
HEADS = ("tokens", "text", "words")


class Block(nn.Module):
    """Attention, then an MLP, each added to the residual stream, with a norm before or after.

    causal: its tokens look back alone. cross: there is a second attention between the two, which
    looks at another text.
    """

    def __init__(self, config: ModelConfig, *, causal: bool, cross: bool = False):
        super().__init__()
        new_attention = partial(
            MultiHeadAttention,
            config.n_embd,
            config.n_head,
            n_kv_head=config.n_kv_head,
            head_size=config.head_size,
            bias=config.bias,
            dropout=config.dropout,
            qk_norm=partial(RMSNorm, eps=config.norm_eps) if config.qk_norm else nn.Identity,
        )
        self.attn_norm = NORMS[config.norm](config)
        self.attn = new_attention(causal=causal)
        if cross:
            self.cross_norm = NORMS[config.norm](config)
            self.cross = new_attention(causal=False)
        self.mlp_norm = NORMS[config.norm](config)
        self.mlp = MLPS[config.mlp](config)
        self.dropout = Dropout(config.dropout)
        self.norm_first = config.norm_first

    def residual_writers(self) -> tuple[nn.Linear, ...]:
        """The layers whose output is added to the residual stream; they start smaller."""
        crossing = (self.cross.out,) if hasattr(self, "cross") else ()
        return self.attn.out, *crossing, self.mlp.down

    def forward(
        self,
        x: Tensor,
        *,
        angles: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        memory_cache: KVCache | None = None,
    ) -> Tensor:
        """x: (B, T, C) -> (B, T, C).

        angles, mask and cache are those of its attention; memory, what its cross attention looks
        at, has a mask and a cache of its own.
        """
        x = self.add(x, partial(self.attn, angles=angles, mask=mask, cache=cache), self.attn_norm)
        if memory is not None:
            look = partial(self.cross, memory=memory, mask=memory_mask, cache=memory_cache)
            x = self.add(x, look, self.cross_norm)
        return self.add(x, self.mlp, self.mlp_norm)

    def add(self, x: Tensor, change: Callable[[Tensor], Tensor], norm: nn.Module) -> Tensor:
        """x with what the change makes of it."""
        if self.norm_first:
            return x + self.dropout(change(norm(x)))
        return norm(x + self.dropout(change(x)))
