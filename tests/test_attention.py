"""Attention: both paths against the formula in NumPy, and the laws that no path may break."""

from functools import partial

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import close
from strategies import (
    attention_by,
    attention_inputs,
    both_paths,
    head_counts,
    scramble,
    seeds,
    to_torch,
    torch_seeded,
    weights_of,
)
from torch import nn

from nanolm.attention import (
    KVCache,
    MultiHeadAttention,
    attention,
    causal_mask,
    fast_attention,
    prefer_formula,
    rotary_angles,
    rotate,
)
from nanolm.layers import RMSNorm

both_functions = pytest.mark.parametrize("attend", [attention, fast_attention])


def call(attend, q, k, v, *, causal, mask, dtype=torch.float64):
    q, k, v, mask = to_torch(q, k, v, mask, dtype=dtype)
    return attend(q, k, v, causal=causal, mask=mask)


# The function


@both_functions
@given(attention_inputs())
@settings(deadline=None, max_examples=40)
def test_attention_is_its_formula(attend, inputs):
    *qkv, options = inputs
    assert close(call(attend, *qkv, **options), reference.attention(*qkv, **options), 1e-12)


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@given(attention_inputs())
@settings(deadline=None, max_examples=40)
def test_the_fused_kernels_compute_the_formula(dtype, tol, inputs):
    *qkv, options = inputs
    fused = call(fast_attention, *qkv, **options, dtype=dtype)
    assert fused.dtype == dtype
    assert close(fused, call(attention, *qkv, **options, dtype=dtype), tol)


@given(attention_inputs(), seeds)
@settings(deadline=None, max_examples=20)
def test_the_fused_kernels_have_the_gradient_of_the_formula(inputs, seed):
    *qkv, options = inputs
    direction = torch.from_numpy(np.random.default_rng(seed).normal(size=qkv[0].shape))
    (mask,) = to_torch(options["mask"])
    gradients = []
    for attend in (attention, fast_attention):
        leaves = [t.requires_grad_() for t in to_torch(*(a.copy() for a in qkv))]
        y = attend(*leaves, causal=options["causal"], mask=mask)
        gradients.append(torch.autograd.grad((y * direction).sum(), leaves))
    for formula, fused in zip(*gradients, strict=True):
        assert close(fused, formula, 1e-10)


@both_functions
@given(attention_inputs(), seeds)
@settings(deadline=None, max_examples=40)
def test_a_hidden_key_has_exactly_no_influence(attend, inputs, seed):
    """Masks are -inf, not merely large: what no query may see can become anything."""
    q, k, v, options = inputs
    T, S = q.shape[2], k.shape[2]
    visible = np.ones((T, S), bool) if options["mask"] is None else options["mask"]
    if options["causal"]:
        visible = visible & (np.arange(S) <= np.arange(T)[:, None] + S - T)
    visible = np.broadcast_to(visible, (*q.shape[:2], T, S)).any(axis=2)  # to any query
    B, n_kv_head = k.shape[:2]
    hidden = ~visible.reshape(B, n_kv_head, -1, S).any(axis=2)  # (B, n_kv_head, S)
    before = call(attend, q, k, v, **options)
    noise = np.random.default_rng(seed).normal(size=(2, *k.shape)) * 1e6
    k, v = (np.where(hidden[..., None], n, x) for n, x in zip(noise, (k, v), strict=True))
    assert torch.equal(call(attend, q, k, v, **options), before)


@both_functions
@pytest.mark.parametrize("options", [{"mask": torch.eye(3, dtype=torch.bool)}, {"causal": True}])
def test_the_only_visible_key_is_read_however_low_its_score(attend, options):
    """Query 0 sees key 0 alone, whose score is far below any finite stand-in for -inf."""
    q, k = torch.full((2, 5, 3, 8), 1e3), torch.ones(2, 5, 3, 8)
    k[:, :, 0] = -1e3
    v = torch.randn(2, 5, 3, 8, generator=torch_seeded(0))
    assert torch.equal(attend(q, k, v, **options)[:, :, 0], v[:, :, 0])


@both_functions
@given(attention_inputs(causal=True), seeds)
@settings(deadline=None, max_examples=40)
def test_a_later_key_has_exactly_no_influence_on_an_earlier_query(attend, inputs, seed):
    q, k, v, options = inputs
    T, S = q.shape[2], k.shape[2]
    before = call(attend, q, k, v, **options)
    random = np.random.default_rng(seed)
    t = int(random.integers(T))
    k, v = k.copy(), v.copy()
    later = slice(S - T + t + 1, None)
    k[:, :, later], v[:, :, later] = random.normal(size=(2, *k[:, :, later].shape)) * 1e6
    assert torch.equal(call(attend, q, k, v, **options)[:, :, : t + 1], before[:, :, : t + 1])


@given(st.integers(1, 7), st.integers(0, 6))
@settings(deadline=None, max_examples=20)
def test_the_last_query_sees_every_key_and_each_earlier_one_sees_one_less(T, earlier):
    S = T + earlier
    seen = causal_mask(T, S)
    assert seen.shape == (T, S)
    assert seen.sum(dim=1).tolist() == list(range(S - T + 1, S + 1))
    assert torch.equal(seen, seen.sort(dim=1, descending=True).values)  # the first ones


@both_functions
def test_dropout_drops_a_weight_or_scales_it_up_so_that_the_mean_stays(attend):
    """With equal scores and the identity as values, attention returns its own weights."""
    S, p = 16, 0.25
    torch.manual_seed(0)
    q, v = torch.zeros(64, 2, S, S), torch.eye(S).expand(64, 2, S, S)
    weights = attend(q, q, v, dropout=p)
    kept = weights != 0
    assert close(weights[kept], torch.full_like(weights[kept], 1 / S / (1 - p)), 1e-6)
    assert abs(kept.double().mean() - (1 - p)) < 0.01
    assert close(weights.mean(), 1 / S, 1e-3)


def test_only_a_cpu_prefers_the_formula_and_never_for_a_single_query():
    """The fused kernels need no (T, S) scores: at long contexts only they are an option."""
    for dtype in (torch.float32, torch.bfloat16):
        assert not prefer_formula("cuda", dtype, 64, 64)
        assert not prefer_formula("cpu", dtype, 1, 64)
        assert prefer_formula("cpu", dtype, 64, 64)
    assert not prefer_formula("cpu", torch.float32, 4096, 4096)


# Rotary positions


def turned(x, positions, theta=10000.0):
    (x,) = to_torch(x)
    return rotate(x, rotary_angles(torch.as_tensor(positions), x.shape[-1], theta))


@given(st.sampled_from([2, 6, 10]), st.sampled_from([10.0, 10000.0]), st.integers(0, 50), seeds)
@settings(deadline=None, max_examples=30)
def test_rotary_positions_are_their_formula(hs, theta, start, seed):
    """They turn pairs as complex numbers, at any positions, and keep every pair's length."""
    x = np.random.default_rng(seed).normal(size=(2, 3, 5, hs))
    positions = np.arange(start, start + 5)
    y = turned(x, positions, theta)
    assert close(y, reference.rotary(x, positions, theta))
    assert close(y.norm(dim=-1), np.linalg.norm(x, axis=-1))


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 20), seeds)
@settings(deadline=None, max_examples=30)
def test_rotated_products_depend_on_the_distance_only(m, n, shift, seed):
    q, k = np.random.default_rng(seed).normal(size=(2, 1, 6))

    def product(i, j):
        return (turned(q, [i]) * turned(k, [j])).sum()

    assert close(product(m + shift, n + shift), product(m, n))


def test_position_0_is_not_turned_and_angles_keep_the_precision_of_fp32():
    cos, sin = rotary_angles(torch.arange(3), 6)
    assert cos.shape == sin.shape == (3, 3)
    assert cos.dtype == sin.dtype == torch.float32
    x = torch.randn(2, 3, 1, 6, dtype=torch.bfloat16)
    y = rotate(x, (cos[:1], sin[:1]))
    assert y.dtype == x.dtype
    assert torch.equal(y, x)


# The cache


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), seeds)
@settings(deadline=None, max_examples=20)
def test_a_cache_returns_all_that_was_appended_in_order(lengths, seed):
    k, v = torch.from_numpy(np.random.default_rng(seed).normal(size=(2, 2, 3, sum(lengths), 7)))
    cache, end = KVCache(max_length=25), 0
    assert cache.length == 0
    for n in lengths:
        start, end = end, end + n
        seen_k, seen_v = cache.append(k[:, :, start:end], v[:, :, start:end])
        assert cache.length == end
        assert seen_k.dtype == seen_v.dtype == k.dtype
        assert torch.equal(seen_k, k[:, :, :end])
        assert torch.equal(seen_v, v[:, :, :end])


def test_a_cache_takes_its_memory_once():
    cache = KVCache(max_length=11)
    row = torch.ones(2, 3, 1, 5)
    addresses = {cache.append(row, row)[0].data_ptr() for _ in range(11)}
    assert len(addresses) == 1
    assert cache.k.shape == cache.v.shape == (2, 3, 11, 5)


# The module


@st.composite
def modules(draw, **fixed):
    """A MultiHeadAttention in float64, its twin's arguments, its inputs, and its rotary angles."""
    n_head, n_kv_head = draw(head_counts)
    rotary, head_size = draw(st.booleans()), draw(st.sampled_from([4, 6]))
    causal, norm_eps, seed = draw(st.booleans()), draw(st.sampled_from([1e-5, 0.1])), draw(seeds)
    module = MultiHeadAttention(
        7,
        n_head,
        n_kv_head=n_kv_head,
        head_size=head_size,
        bias=draw(st.booleans()),
        causal=causal,
        qk_norm=draw(st.sampled_from([nn.Identity, partial(RMSNorm, eps=norm_eps)])),
        **{"dropout": 0.0} | fixed,
    )
    scramble(module.double(), seed)
    x = np.random.default_rng(seed).normal(size=(2, 5, 7))
    start = draw(st.sampled_from([0, 3]))
    positions = np.arange(start, start + 5) if rotary else None
    angles = rotary_angles(torch.from_numpy(positions), head_size, 10.0) if rotary else None
    twin = {
        "params": weights_of(module),
        "n_head": n_head,
        "n_kv_head": n_kv_head,
        "head_size": head_size,
        "causal": causal,
        "rope_theta": 10.0 if rotary else None,
        "positions": positions,
        "norm_eps": norm_eps,
    }
    return module, twin, x, angles


@both_paths
@given(modules(), st.booleans(), seeds)
@settings(deadline=None, max_examples=40)
def test_multi_head_attention_is_its_formula(path, drawn, masked, seed):
    module, twin, x, angles = drawn
    mask = None
    if masked:
        mask = (np.random.default_rng(seed).random((2, 1, 5, 5)) < 0.5) | np.eye(5, dtype=bool)
    with attention_by(path):
        y = module(*to_torch(x), angles=angles, mask=to_torch(mask)[0])
    tol = 1e-10 if angles is None else 1e-5  # angles are fp32
    assert close(y, reference.multi_head_attention(x, mask=mask, **twin), tol)


@pytest.mark.parametrize("bias", [False, True])
def test_every_projection_has_a_bias_or_none_has(bias):
    module = MultiHeadAttention(7, 4, n_kv_head=2, head_size=3, bias=bias, dropout=0.0)
    found = {name for name, _ in module.named_parameters() if name.endswith("bias")}
    assert found == ({"q.bias", "k.bias", "v.bias", "out.bias"} if bias else set())


@both_paths
@given(modules(dropout=0.5))
@settings(deadline=None, max_examples=15)
def test_dropout_falls_on_the_weights_in_training_only(path, drawn):
    module, twin, x, angles = drawn
    (x_torch,) = to_torch(x)
    with attention_by(path):
        y = module.eval()(x_torch, angles=angles)
        assert close(y, reference.multi_head_attention(x, **twin))
        torch.manual_seed(0)
        assert not close(module.train()(x_torch, angles=angles), y, 1e-3)


@both_paths
@given(modules(), st.integers(1, 4))
@settings(deadline=None, max_examples=20)
def test_a_module_with_a_cache_reads_a_sequence_in_two_parts(path, drawn, cut):
    module, _, x, angles = drawn
    module.causal = True
    (x,) = to_torch(x)
    cache, parts = KVCache(max_length=7), []
    with attention_by(path):
        whole = module(x, angles=angles)
        for part in (slice(0, cut), slice(cut, None)):
            turn = None if angles is None else tuple(a[part] for a in angles)
            parts.append(module(x[:, part], angles=turn, cache=cache))
    assert close(torch.cat(parts, dim=1), whole, 1e-10)


@pytest.mark.parametrize(("theta", "hs"), [(10_000.0, 64), (1_000_000.0, 128), (500_000.0, 128)])
def test_rotary_angles_are_those_of_other_implementations_to_the_last_bit(theta, hs):
    """transformers rounds 1 / theta^(i / hs). With theta^(-i / hs) angles at position 27,000 were
    2e-3 apart, and the logits of a Llama drifted.
    """
    positions = torch.arange(0, 40_000, 9)
    inverse = 1.0 / (theta ** (torch.arange(0, hs, 2, dtype=torch.int64).float() / hs))
    angles = torch.outer(positions.float(), inverse)
    cos, sin = rotary_angles(positions, hs, theta)
    assert torch.equal(cos, angles.cos())
    assert torch.equal(sin, angles.sin())


def test_positions_are_counted_in_full_precision():
    """bfloat16 has no 257, and float16 no 2,049."""
    positions = torch.arange(4000)
    cos, sin = rotary_angles(positions, 4, 100.0)
    exact = positions.double()[:, None] * torch.tensor([1.0, 0.1], dtype=torch.float64)
    assert close(cos, exact.cos(), 1e-3)
    assert close(sin, exact.sin(), 1e-3)
