"""Attention: how the tokens of a sequence look at one another.

Every token makes three vectors out of its own channels: a query ("what am I looking for"), a key
("what do I hold") and a value ("what do I pass on"). A query is compared with all keys by their
dot product; a softmax turns the scores into weights that sum to one; the answer is the mean of the
values under these weights (Vaswani et al. 2017, eq. 1):

    Attention(Q, K, V) = softmax(Q K^T / sqrt(hs)) V

The scores are divided by sqrt(hs) because the dot product of two vectors with hs independent
entries of variance 1 has variance hs: undivided, the softmax of a wide head would start out
saturated, where its gradient is zero. A language model must not look ahead, so every score of a
later key is replaced by -inf before the softmax (causal attention).

The queries of a text may also look at another one, as a translation looks at its source: keys and
values are then made out of that (cross attention).

Several heads do this side by side, each on its own slice of the channels. Grouped heads (Ainslie
et al. 2023) let several query heads share one key/value head, which makes the cache smaller.
Rotary positions (Su et al. 2021, eq. 34) turn queries and keys by an angle proportional to their
position, so that their product depends on the distance between them alone.

Shapes are named by these letters, in every chapter:

    B batch    T queries (tokens of this call)    S keys (tokens so far)
    C channels    V vocabulary    nh heads    hs channels of a head
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def causal_mask(T: int, S: int, device: torch.device | str = "cpu") -> Tensor:
    """Who may look at whom: (T, S) booleans, True where query t may see key s.

    The queries are the last T of the S tokens, so query t stands at position S - T + t.
    """
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(diagonal=S - T)


def attention_weights(
    q: Tensor, k: Tensor, *, causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    """How much each query looks at each key: softmax(Q K^T / sqrt(hs)), (B, nh, T, S).

    q: (B, nh, T, hs); k: (B, n_kv_head, S, hs), where n_kv_head divides nh and query head i reads
    key head i // (nh / n_kv_head). mask: booleans that broadcast to (B, nh, T, S), True where a
    query may look; each query needs at least one key. causal: also forbid what comes later
    (S >= T).
    """
    (nh, T, hs), S = q.shape[1:], k.shape[-2]
    scores = q @ for_each_query(k, nh).transpose(-2, -1) / math.sqrt(hs)  # (B, nh, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    if causal:
        scores = scores.masked_fill(~causal_mask(T, S, q.device), -math.inf)
    return torch.softmax(scores, dim=-1)


def for_each_query(x: Tensor, nh: int) -> Tensor:
    """Keys or values, (B, n_kv_head, S, hs), each head as often as query heads read it."""
    groups = nh // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)  # (B, nh, S, hs)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    heads: tuple[int, int] | None = None,
) -> Tensor:
    """Scaled dot-product attention, as the formula (Vaswani et al. 2017, eq. 1).

    q, k, causal, mask: as of attention_weights; v: as k. dropout: the probability that a weight is
    dropped. heads: where those of q are only a part, the number of the first and of all. Returns
    (B, nh, T, hs).
    """
    weights = attention_weights(q, k, causal=causal, mask=mask)  # (B, nh, T, S)
    if heads is None:
        weights = drop(weights, dropout)
    else:
        weights = weights * dropout_of_part(weights, dropout, *heads)
    return weights.to(v.dtype) @ for_each_query(v, q.shape[1])  # (B, nh, T, hs)


def dropout_of_part(weights: Tensor, dropout: float, first: int, n_head: int) -> Tensor:
    """What dropout multiplies the weights of these heads by, where it falls on all n_head at once.

    weights: (B, nh, T, S), of the heads from the first on. The random numbers of all are drawn.
    """
    B, nh, T, S = weights.shape
    return drop(weights.new_ones(B, n_head, T, S), dropout)[:, first : first + nh].clone()


def drop(x: Tensor, p: float) -> Tensor:
    """x with each entry replaced by 0 with probability p, the others divided by 1 - p.

    Srivastava et al. 2014. On a CPU, which draws one number after the other, p is rounded to a
    multiple of 2^-16: four entries are then decided by the bits of one number of 64.
    """
    kinds, dropped = 2**16, round(p * 2**16)  # of the values that 16 bits have
    if x.device.type != "cpu" or not dropped:
        return F.dropout(x, p)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = draws.view(torch.int16)[: x.numel()].view(x.shape) > dropped - kinds // 2 - 1
    return torch.where(kept, x * (kinds / max(1, kinds - dropped)), 0.0)


def fast_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The same function through PyTorch's fused kernels, which never store the (T, S) scores."""
    T, S = q.shape[-2], k.shape[-2]
    if causal and T == 1:
        causal = False  # one query, the newest token, sees all keys
    if causal and (mask is not None or T != S):
        # PyTorch aligns its causal mask at the top left: with T < S, query 0 would see only key 0.
        aligned = causal_mask(T, S, q.device)
        mask, causal = (aligned if mask is None else mask & aligned), False
    return F.scaled_dot_product_attention(
        q, k, v, mask, dropout, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )


def prefer_formula(device_type: str, dtype: torch.dtype, S: int, dropout: float) -> bool:
    """Whether the formula is the faster of the two: a rule drawn from benchmarks/attention.py.

    On a CPU the fused kernel knows no dropout, and is slow in half precision until the scores no
    longer fit into the processor's memory; everywhere else it wins.
    """
    return device_type == "cpu" and (dropout > 0 or (dtype.itemsize == 2 and S <= 512))


def rotary_angles(positions: Tensor, hs: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position * theta^(-2i/hs), i = 0 .. hs/2 - 1 (Su et al. 2021, eq. 15).

    positions: (T,). Returns two tensors (T, hs/2), fp32.
    """
    # 1 / theta^x, and not theta^-x: the others round so, and a long text shows the difference
    frequencies = 1.0 / theta ** (torch.arange(0, hs, 2, device=positions.device).float() / hs)
    angles = positions.float()[:, None] * frequencies  # (T, hs/2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of channels (i, i + hs/2) by its angle: rotary positions in Llama's layout.

    x: (B, nh, T, hs); angles: as rotary_angles gives them, or those of each text, (B, 1, T, hs/2).
    Shape, dtype and norms stay.
    """
    cos, sin = angles[0].to(x.dtype), angles[1].to(x.dtype)  # (T, hs/2)
    first, second = x.chunk(2, dim=-1)  # (B, nh, T, hs/2) each
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


class Linear(nn.Linear):
    """x W^T + b for each vector x of the last axis."""

    few = 8  # so many vectors count as few

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C) -> (B, T, out)."""
        n = x.shape[:-1].numel()
        if n > self.few or x.device.type != "cpu" or torch.is_grad_enabled():
            return super().forward(x)
        if torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        # As long as it takes to read W: as columns, and two at least, MKL reads it faster.
        rows = x.reshape(n, x.shape[-1])
        rows = rows if n > 1 else torch.cat((rows, rows))
        y = self.weight.mm(rows.t())[:, :n].t().contiguous().view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class KVCache:
    """The keys and values that one attention layer has computed so far.

    Causal attention never changes the past, so when a text grows by a token, only that token's key
    and value are new. Space for max_length tokens, or for as many as come, is taken at the first
    append.
    """

    def __init__(self, max_length: int):
        self.max_length = max_length
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add k and v, (B, n_kv_head, T, hs) each; returns all so far, (B, n_kv_head, S, hs)."""
        B, n_kv_head, T, hs = k.shape
        if self.length == 0:
            self.k = k.new_empty(B, n_kv_head, max(T, self.max_length), hs)
            self.v = torch.empty_like(self.k)
        self.k.narrow(2, self.length, T).copy_(k)
        self.v.narrow(2, self.length, T).copy_(v)
        self.length += T
        return self.held()

    def held(self) -> tuple[Tensor, Tensor]:
        """All keys and values so far, (B, n_kv_head, S, hs) each."""
        return self.k.narrow(2, 0, self.length), self.v.narrow(2, 0, self.length)

    def take(self, rows: Tensor) -> None:
        """Go on with these rows of the batch, (B,) numbers, some of which may come twice."""
        self.k, self.v = self.k[rows], self.v[rows]


class MultiHeadAttention(nn.Module):
    """Attention with several heads, each in its own subspace (Vaswani et al. 2017, section 3.2.2).

    n_kv_head key/value heads serve n_head query heads. qk_norm makes the norm of every query, and
    that of every key, before the rotation (Henry et al. 2020; the layout is Qwen3's): an RMSNorm
    bounds the scores. dropout falls on the weights while training; the caller drops the output.
    """

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        *,
        n_kv_head: int,
        head_size: int,
        bias: bool,
        dropout: float,
        causal: bool = True,
        qk_norm: Callable[[int], nn.Module] = nn.Identity,
    ):
        super().__init__()
        self.head_size, self.dropout, self.causal = head_size, dropout, causal
        self.n_head, self.first_head = n_head, 0  # of a part of the heads, the number of its first
        self.q = Linear(n_embd, n_head * head_size, bias=bias)
        self.k = Linear(n_embd, n_kv_head * head_size, bias=bias)
        self.v = Linear(n_embd, n_kv_head * head_size, bias=bias)
        self.out = Linear(n_head * head_size, n_embd, bias=bias)
        self.q_norm, self.k_norm = qk_norm(head_size), qk_norm(head_size)

    def forward(
        self,
        x: Tensor,
        *,
        memory: Tensor | None = None,
        angles: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Let the tokens x, (B, T, C), look at one another, and at those of the cache before them.

        memory: (B, S, C), what they look at instead; a cache then keeps its keys and values, which
        are made once. angles: rotary angles of the T positions. mask: booleans that broadcast to
        (B, nh, T, S), True where a query may look. Returns (B, T, C).
        """
        B, T, _ = x.shape
        q = self.q_norm(self.q(x).view(B, T, -1, self.head_size)).transpose(1, 2)  # (B, nh, T, hs)
        if memory is not None and cache is not None and cache.length:
            k, v = cache.held()
        else:
            seen = x if memory is None else memory
            k = self.k(seen).view(B, seen.shape[1], -1, self.head_size)
            v = self.v(seen).view(k.shape).transpose(1, 2)
            k = self.k_norm(k).transpose(1, 2)
            if angles is not None:
                q, k = rotate(q, angles), rotate(k, angles)
            if cache is not None:
                k, v = cache.append(k, v)  # (B, n_kv_head, S, hs)
        y = self.attend(q, k, v, mask)  # (B, nh, T, hs)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """attention, by the faster way. Shapes as there."""
        dropout = self.dropout if self.training else 0.0
        formula = prefer_formula(q.device.type, q.dtype, k.shape[2], dropout)
        attend = attention if formula else fast_attention
        if q.shape[1] < self.n_head and dropout:
            attend = partial(attention, heads=(self.first_head, self.n_head))
        return attend(q, k, v, causal=self.causal, mask=mask, dropout=dropout)
