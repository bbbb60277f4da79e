"""NumPy twins: every formula of the package once more, in float64, as slow and plain as possible.

Nothing here calls PyTorch or the package: where both agree, two people have read the same paper.
Weights are in the layout of PyTorch's linear layers, (out, in). T queries, S keys, C channels, V
vocabulary, nh heads, hs channels of a head.
"""

import math
from functools import partial

import numpy as np


class Formulas(dict):
    """Formulas by the name of a choice; one without a formula is not compared with another's."""

    def __missing__(self, name):
        raise LookupError(f"no formula for {name!r}: add it to tests/reference.py")


def assert_close(found, formula, tol=1e-5):
    """Fail where |found - formula| > tol max(1, max|formula|), and say where it is worst."""
    __tracebackhide__ = True
    found, formula = (
        np.asarray(x.detach().double() if hasattr(x, "detach") else x, float)
        for x in (found, formula)
    )
    assert found.shape == formula.shape, f"shape {found.shape}, formula {formula.shape}"
    gaps = np.nan_to_num(np.abs(found - formula), nan=math.inf)
    worst = tuple(map(int, np.unravel_index(gaps.argmax(), gaps.shape)))
    allowed = tol * max(1.0, np.abs(formula).max())
    assert gaps[worst] <= allowed, (
        f"largest difference {gaps[worst]:.2g} at {worst}: {found[worst]:.6g}, "
        f"formula {formula[worst]:.6g} (allowed {allowed:.0e})"
    )


# Functions of the channels


def softmax(x):
    """exp(x_i) / sum_j exp(x_j) over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def layer_norm(x, weight, bias, eps):
    """(x - mean) / sqrt(variance + eps) * weight + bias (Ba et al. 2016, eq. 3-4)."""
    centred = x - x.mean(axis=-1, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps) * weight
    return y if bias is None else y + bias


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019, eq. 4)."""
    return x * weight / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)


def gelu_erf(x):
    """x Phi(x) = x (1 + erf(x / sqrt 2)) / 2 (Hendrycks & Gimpel 2016, section 2)."""
    return x * 0.5 * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2)))


def gelu_tanh(x):
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 (Hendrycks & Gimpel 2016, section 2)."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
    """x sigmoid(x) = x / (1 + exp(-x)) (Elfwing et al. 2018, eq. 5)."""
    return x / (1 + np.exp(-x))


def linear(x, weight, bias=0.0):
    """x W^T + b."""
    return np.einsum("...i,oi->...o", x, weight) + bias


def relu(x):
    """max(0, x) (Vaswani et al. 2017, eq. 2)."""
    return np.maximum(0, x)


def relu2(x):
    """max(0, x)^2 (So et al. 2021, section 4.2)."""
    return np.maximum(0, x) ** 2


# A norm takes x, its weights by name, and eps.
NORMS = Formulas(
    layer=lambda x, params, eps: layer_norm(x, params["weight"], params.get("bias"), eps),
    rms=lambda x, params, eps: rms_norm(x, params["weight"], eps),
)

# The activation of an MLP, and whether it has a gate.
MLPS = Formulas(
    gelu=(gelu_tanh, False),
    gelu_erf=(gelu_erf, False),
    swiglu=(silu, True),
    relu=(relu, False),
    relu2=(relu2, False),
    silu=(silu, False),
)


def mlp(x, params, kind):
    """down(f(up x)); with a gate down(f(gate x) * up x) (Shazeer 2020, eq. 6)."""
    activation, gated = MLPS[kind]

    def layer(name, x):
        return linear(x, params[f"{name}.weight"], params.get(f"{name}.bias", 0.0))

    up = layer("up", x)
    return layer("down", activation(layer("gate", x)) * up if gated else activation(up))


# Positions


def sinusoids(length, C):
    """Sines of pos / 10000^(2i/C), then their cosines (Vaswani et al. 2017, section 3.5)."""
    table, half = np.zeros((length, C)), (C + 1) // 2
    for position in range(length):
        for channel in range(C):
            angle = position / 10000 ** (2 * (channel % half) / C)
            table[position, channel] = math.sin(angle) if channel < half else math.cos(angle)
    return table


def rotary(x, positions, theta):
    """z_i exp(1j pos theta^(-2i/hs)), z_i = x_i + 1j x_(i + hs/2) (Su et al. 2021, eq. 12, 15).

    x: (..., T, hs); positions: (T,).
    """
    half = x.shape[-1] // 2
    z = x[..., :half] + 1j * x[..., half:]
    turn = np.outer(positions, [theta ** (-i / half) for i in range(half)])
    z = z * np.exp(1j * turn)
    return np.concatenate((z.real, z.imag), axis=-1)


# What is added to the embeddings of T tokens with C channels.
POSITIONS = Formulas(
    learned=lambda params, T, C: params["positions.weight"][:T],
    sinusoidal=lambda params, T, C: sinusoids(T, C),
    rotary=lambda params, T, C: 0.0,  # they are inside attention
)


# Attention


def attention(q, k, v, causal=False, mask=None):
    """softmax(q K^T / sqrt(hs)) V, over the keys that each query sees (Vaswani et al., eq. 1).

    q: (B, nh, T, hs); k, v: (B, n_kv, S, hs); query head i reads key/value head i // (nh / n_kv).
    mask: True where a query may look. causal: the T queries are the last of the S tokens.
    """
    (B, nh, T, hs), (n_kv, S) = q.shape, k.shape[1:3]
    may_look = np.broadcast_to(True if mask is None else mask, (B, nh, T, S))
    y = np.zeros(q.shape)
    for b, head, t in np.ndindex(B, nh, T):
        shared = head // (nh // n_kv)
        present = S - T + t
        seen = [s for s in range(S) if may_look[b, head, t, s] and (s <= present or not causal)]
        weights = softmax(k[b, shared, seen] @ q[b, head, t] / math.sqrt(hs))
        y[b, head, t] = weights @ v[b, shared, seen]
    return y


def multi_head_attention(
    x,
    params,
    n_head,
    n_kv_head,
    head_size,
    *,
    memory=None,
    causal=True,
    mask=None,
    rope_theta=None,
    positions=None,
    norm_eps=1e-5,
):
    """out(concat(heads)), head_h = attention(x W_q, x W_k, x W_v) (Vaswani et al., sect. 3.2.2).

    x: (B, T, C); params: weights by name ("q.weight", "q.bias", ...; biases and "q_norm.weight"
    only where they exist). With rope_theta, queries and keys turn by positions (default: from 0).
    memory: (B, S, C), from which keys and values are made instead.
    """
    B, T, _ = x.shape

    def heads(x, name, n):
        y = linear(x, params[f"{name}.weight"], params.get(f"{name}.bias", 0.0))
        y = np.stack(np.split(y, n, axis=-1), axis=1)  # (B, n, T, hs)
        assert y.shape == (B, n, x.shape[1], head_size)
        if f"{name}_norm.weight" in params:
            y = rms_norm(y, params[f"{name}_norm.weight"], norm_eps)
        if rope_theta is not None and name != "v":
            y = rotary(y, np.arange(T) if positions is None else positions, rope_theta)
        return y

    seen = x if memory is None else memory
    q, k, v = heads(x, "q", n_head), heads(seen, "k", n_kv_head), heads(seen, "v", n_kv_head)
    y = attention(q, k, v, causal=causal, mask=mask)
    y = np.concatenate([y[:, h] for h in range(n_head)], axis=-1)  # (B, T, nh hs)
    return linear(y, params["out.weight"], params.get("out.bias", 0.0))


# The whole model


def transformer(
    params, config, ids, mask=None, types=None, places=None, source=None, source_mask=None
):
    """Logits: (B, T, V) of a decoder, and of an encoder that finds tokens (B, P, V).

    params: the model's state dict as float64 arrays. mask, (B, T), source_mask, (B, S): which
    tokens are no padding. places: (B, P). source: (B, S), for an encoder whose last vectors the
    decoder looks at.
    """
    options = {}
    if source is not None:
        encoder, n = below(params, "encoder"), config.n_encoder_layer
        read = tower(encoder, config, source, n, causal=False, mask=source_mask)
        options = {"memory": read, "memory_mask": source_mask}
    causal = config.causal
    x = tower(
        params, config, ids, config.n_layer, causal=causal, mask=mask, types=types, **options
    )
    return head(x, partial(below, params), config, mask, places)


def below(params, prefix):
    """The weights of a part, by their names in it."""
    start = prefix + "."
    return {n.removeprefix(start): w for n, w in params.items() if n.startswith(start)}


def tower(
    params, config, ids, n_layer, *, causal, mask=None, types=None, memory=None, memory_mask=None
):
    """The last vectors, (B, T, C), after n_layer blocks.

    x += attention(norm x); x += mlp(norm x) (GPT-2's layout, Radford et al. 2019); without
    norm_first x = norm(x + attention(x)); x = norm(x + mlp(x)) (Vaswani et al. 2017); with a
    memory, there is an attention to it between the two.
    """

    def norm(x, name):
        return NORMS[config.norm](x, below(params, name), config.norm_eps)

    def add(x, change, name):
        return x + change(norm(x, name)) if config.norm_first else norm(x + change(x), name)

    def attend(name, mask, **options):
        return partial(
            multi_head_attention,
            params=below(params, name),
            n_head=config.n_head,
            n_kv_head=config.n_kv_head,
            head_size=config.head_size,
            mask=None if mask is None else mask[:, None, None, :],
            norm_eps=config.norm_eps,
            **options,
        )

    turn = {"rope_theta": config.rope_theta if config.position == "rotary" else None}
    x = params["tokens.weight"][ids] * (config.n_embd**0.5 if config.scale_embeddings else 1.0)
    x = x + POSITIONS[config.position](params, *x.shape[1:])
    if config.n_types:
        x = x + params["types.weight"][np.zeros_like(ids) if types is None else types]
    if not config.norm_first and not config.n_encoder_layer:  # as BERT
        x = norm(x, "embedding_norm")
    for i in range(n_layer):
        block = f"blocks.{i}"
        x = add(x, attend(f"{block}.attn", mask, causal=causal, **turn), f"{block}.attn_norm")
        if memory is not None:
            across = attend(f"{block}.cross", memory_mask, causal=False, memory=memory)
            x = add(x, across, f"{block}.cross_norm")
        think = partial(mlp, params=below(params, f"{block}.mlp"), kind=config.mlp)
        x = add(x, think, f"{block}.mlp_norm")
    return norm(x, "norm") if config.norm_first else x


def head(x, below, config, mask, places):
    """What follows the last block: BERT's heads after post-norm blocks, otherwise EuroBERT's."""
    if places is not None:
        x = np.stack([row[at] for row, at in zip(x, places, strict=True)])
    elif config.head == "text":
        kept = np.ones(x.shape[:2], bool) if mask is None else mask
        x = np.stack([row[own].mean(0) for row, own in zip(x, kept, strict=True)])[:, None]
    first = below("transform.0")
    if not config.causal and config.head == "text":
        x = (gelu_erf if config.norm_first else np.tanh)(linear(x, **first))
    if not config.causal and config.head == "tokens" and not config.norm_first:
        x = gelu_erf(linear(x, **first))
        x = NORMS[config.norm](x, below("transform.2"), config.norm_eps)
    weights = below("head")
    if config.head == "tokens" and config.tie_embeddings:
        weights["weight"] = below("tokens")["weight"]
    return linear(x, **weights)


def cross_entropy(logits, targets, smoothing=0.0):
    """Mean of log(sum_j exp(z_j)) - z_target over the targets that are not -1; 0 where none is.

    smoothing: so much of z_target is the mean of all z (Szegedy et al. 2016, section 7).
    """
    rows = logits.reshape(-1, logits.shape[-1])
    losses = [
        row.max()
        + math.log(np.exp(row - row.max()).sum())
        - (1 - smoothing) * row[target]
        - smoothing * row.mean()
        for row, target in zip(rows, np.ravel(targets), strict=True)
        if target != -1
    ]
    return math.fsum(losses) / len(losses) if losses else 0.0


# Optimization


# An optimizer takes a weight, its gradient, its memories m and v, and step, which counts from 1;
# it returns the new weight, m and v.


def adam_direction(g, m, v, step, betas):
    """m_hat / (sqrt(v_hat) + eps), m and v (Kingma & Ba 2015, algorithm 1)."""
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g**2
    m_hat, v_hat = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
    return m_hat / (np.sqrt(v_hat) + 1e-8), m, v


def adamw(w, g, m, v, step, *, lr, betas, weight_decay):
    """Loshchilov & Hutter 2019, algorithm 2."""
    direction, m, v = adam_direction(g, m, v, step, betas)
    return w - lr * (weight_decay * w + direction), m, v


def lamb(w, g, m, v, step, *, lr, betas, weight_decay):
    """You et al. 2020, algorithm 2, with phi(x) = x."""
    direction, m, v = adam_direction(g, m, v, step, betas)
    u = direction + weight_decay * w
    return w - lr * np.linalg.norm(w) / np.linalg.norm(u) * u, m, v


def sgd(w, g, m, v, step, *, lr, betas, weight_decay):
    """Momentum as Sutskever et al. 2013, eq. 1, has it, with the rate outside of the memory."""
    m = betas[0] * m + g + weight_decay * w
    return w - lr * m, m, v


def muon(w, g, m, v, step, *, lr, betas, weight_decay):
    """Jordan et al. 2024; the length of a step as in Liu et al. 2025, eq. 4."""
    m = betas[0] * m + (1 - betas[0]) * g
    u, s, vt = np.linalg.svd(betas[0] * m + (1 - betas[0]) * g, full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    length = 0.2 * math.sqrt(max(w.shape))
    return w - lr * (weight_decay * w + length * (u * s) @ vt), m, v


OPTIMIZERS = Formulas(adamw=adamw, lamb=lamb, sgd=sgd, muon=muon)


def clip(grads, max_norm):
    """g max_norm / |g| where |g| > max_norm (Pascanu et al. 2013, alg. 1). Returns g, old |g|."""
    norm = math.sqrt(sum(float((g**2).sum()) for g in grads))
    factor = max_norm / norm if norm > max_norm else 1.0
    return [g * factor for g in grads], norm


def cosine(step, warmup_iters, decay_iters, cooldown_iters):
    """(1 + cos(pi progress)) / 2, progress from 0 to 1 (Loshchilov & Hutter 2017, eq. 5)."""
    return (1 + math.cos(math.pi * (step - warmup_iters) / (decay_iters - warmup_iters))) / 2


def trapezoid(step, warmup_iters, decay_iters, cooldown_iters):
    """1, and a straight line to 0 over the last cooldown steps (Hägele et al. 2024, section 3).

    A cooldown that would begin inside the warm-up begins after it.
    """
    start = max(warmup_iters, decay_iters - cooldown_iters)
    return 1.0 if step <= start else 1 - (step - start) / (decay_iters - start)


def inverse_sqrt(step, warmup_iters, decay_iters, cooldown_iters):
    """step^-0.5 / warmup^-0.5, both counted from 1 (Vaswani et al. 2017, eq. 3)."""
    return (step + 1) ** -0.5 / (warmup_iters + 1) ** -0.5


SCHEDULES = Formulas(cosine=cosine, trapezoid=trapezoid, inverse_sqrt=inverse_sqrt)


def learning_rate(step, schedule, peak, floor, **iters):
    """peak (step + 1) / (warmup + 1) before warmup, floor from decay on, the schedule between."""
    if step < iters["warmup_iters"]:
        return peak * (step + 1) / (iters["warmup_iters"] + 1)
    if step >= iters["decay_iters"]:
        return floor
    return floor + (peak - floor) * SCHEDULES[schedule](step, **iters)


# Sampling


def top_k(logits, k):
    """Indices of all logits not below the k-th largest; all for k of None, 0 or at least V."""
    if not k or k >= len(logits):
        return set(range(len(logits)))
    kth = sorted(logits, reverse=True)[k - 1]
    return {i for i, z in enumerate(logits) if z >= kth}


def top_p(logits, p):
    """Indices of the fewest most likely tokens that reach p together (Holtzman et al. 2020)."""
    if p is None or p >= 1:
        return set(range(len(logits)))
    probabilities = softmax(np.asarray(logits, float))
    kept, total = set(), 0.0
    for i in sorted(range(len(logits)), key=lambda i: -probabilities[i]):  # stable: lower id first
        kept.add(i)
        total += probabilities[i]
        if total >= p:
            break
    return kept


def next_token(logits, temperature, k, p):
    """The distribution that is drawn from: temperature, then top-k, then top-p of what is left."""
    logits = np.asarray(logits, float) / temperature
    for kept in (lambda z: top_k(z, k), lambda z: top_p(z, p)):
        stays = kept(logits)
        logits = np.array([z if i in stays else -math.inf for i, z in enumerate(logits)])
    return softmax(logits)
