"""Attention: each idea by itself, then both paths against the formula, and laws of the parts."""

import math
from functools import partial
from itertools import product

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_close
from strategies import (
    Drawn,
    attention_by,
    attention_inputs,
    both_paths,
    head_counts,
    scramble,
    seeds,
    to_torch,
    weights_of,
)
from torch import nn

from nanolm.attention import (
    KVCache,
    Linear,
    MultiHeadAttention,
    attention,
    drop,
    fast_attention,
    prefer_formula,
    rotary_angles,
    rotate,
)
from nanolm.layers import RMSNorm

both_functions = pytest.mark.parametrize("attend", [attention, fast_attention])


# One idea at a time


def weights(attend, q, k, **options):
    """The weights (T, S) of one head: with the identity as values, they are the answer."""
    return attend(q[None, None], k[None, None], torch.eye(len(k))[None, None], **options)[0, 0]


@both_functions
def test_scores_are_divided_by_the_root_of_the_head_size(attend):
    """In a head of 4 channels, a product of 4 is a score of 2."""
    q, k = torch.ones(1, 4), torch.tensor([[1.0] * 4, [0.0] * 4])
    e = math.exp(2)
    assert_close(weights(attend, q, k), [[e / (e + 1), 1 / (e + 1)]])


@both_functions
def test_neighbouring_query_heads_share_a_key_value_head(attend):
    q, k, v = torch.ones(1, 4, 1, 3), torch.ones(1, 2, 1, 3), torch.ones(1, 2, 1, 3)
    v[:, 1] = 2.0
    assert attend(q, k, v)[0, :, 0, 0].tolist() == [1, 1, 2, 2]


@both_functions
def test_a_query_looks_where_the_mask_is_true(attend):
    mask = torch.tensor([[True, False, True], [False, True, False]])
    found = weights(attend, torch.zeros(2, 4), torch.zeros(3, 4), mask=mask)
    assert_close(found, [[0.5, 0, 0.5], [0, 1, 0]])


@both_functions
def test_the_last_query_stands_at_the_last_key(attend):
    """Aligned at the top left, as PyTorch's causal mask is, query 0 would see key 0 alone."""
    found = weights(attend, torch.zeros(2, 4), torch.zeros(3, 4), causal=True)
    assert_close(found, [[1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]])


@both_functions
@pytest.mark.parametrize("options", [{"mask": torch.eye(3, dtype=torch.bool)}, {"causal": True}])
def test_the_only_visible_key_is_read_however_low_its_score(attend, options):
    """Query 0 sees key 0 alone, whose score is far below any finite stand-in for -inf."""
    q, k = torch.full((3, 8), 1e3), torch.ones(3, 8)
    k[0] = -1e3
    assert weights(attend, q, k, **options)[0].tolist() == [1, 0, 0]


@both_functions
def test_dropout_drops_a_weight_or_scales_it_up_so_that_the_mean_stays(attend):
    S, p = 512, 0.25
    torch.manual_seed(0)
    found = weights(attend, torch.zeros(S, 4), torch.zeros(S, 4), dropout=p)
    kept = found[found != 0]
    assert_close(kept, torch.full_like(kept, 1 / S / (1 - p)), 1e-6)
    assert abs(len(kept) / S**2 - (1 - p)) < 0.01


# Dropout and products


@given(st.lists(st.integers(1, 7), min_size=1, max_size=3), st.sampled_from([0.1, 0.5, 0.9]))
@settings(deadline=None, max_examples=20)
def test_dropout_keeps_the_mean_of_any_shape(shape, p):
    x, n = torch.full(shape, 2.0), -(-40_000 // math.prod(shape))
    torch.manual_seed(0)
    found = torch.stack([drop(x, p) for _ in range(n)])
    assert_close(found[found != 0], torch.full_like(found[found != 0], 2 / (1 - p)), 1e-3)
    assert abs(found.mean() / 2 - 1) < 0.1
    assert abs((found == 0).double().mean() - p) < 0.02


def test_dropout_of_nothing_and_of_all():
    x = torch.ones(5)
    assert torch.equal(drop(x, 0.0), x)
    assert not drop(x, 1.0).any()


def test_neighbours_are_dropped_independently_of_one_another():
    """Four of them come from one random number."""
    torch.manual_seed(0)
    kept = (drop(torch.ones(10_000, 4), 0.5) > 0).double()
    assert_close(np.corrcoef(kept.numpy().T), np.eye(4), 0.05)


@given(st.integers(1, 3), st.integers(1, 5), st.booleans(), seeds)
@settings(deadline=None, max_examples=30)
def test_few_vectors_are_multiplied_as_many(B, T, bias, seed):
    torch.manual_seed(seed)
    layer, x = Linear(7, 11, bias=bias).double(), torch.randn(B, T, 7, dtype=torch.float64)
    with torch.no_grad():
        few = layer(x)
    assert few.is_contiguous()
    assert_close(few, layer(x), 1e-12)  # where a gradient may be asked for, all at once


# The formula


def call(attend, inputs, dtype=torch.float64):
    q, k, v, mask = to_torch(inputs.q, inputs.k, inputs.v, inputs.mask, dtype=dtype)
    return attend(q, k, v, causal=inputs.causal, mask=mask)


@both_functions
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@given(attention_inputs())
@settings(deadline=None, max_examples=40)
def test_attention_is_its_formula(attend, dtype, tol, inputs):
    found = call(attend, inputs, dtype)
    assert found.dtype == dtype
    assert_close(found, reference.attention(**vars(inputs)), tol)


@given(attention_inputs(), seeds)
@settings(deadline=None, max_examples=20)
def test_the_fused_kernels_have_the_gradient_of_the_formula(inputs, seed):
    direction = torch.from_numpy(np.random.default_rng(seed).normal(size=inputs.q.shape))
    gradients = []
    for attend in (attention, fast_attention):
        q, k, v, mask = to_torch(inputs.q, inputs.k, inputs.v, inputs.mask)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        y = attend(*leaves, causal=inputs.causal, mask=mask)
        gradients.append(torch.autograd.grad((y * direction).sum(), leaves))
    for formula, fused in zip(*gradients, strict=True):
        assert_close(fused, formula, 1e-10)


@both_functions
@given(attention_inputs(), seeds)
@settings(deadline=None, max_examples=40)
def test_a_hidden_key_has_exactly_no_influence(attend, inputs, seed):
    """Masks are -inf, not merely large: what a query may not see can become anything."""
    (B, nh, T, _), (n_kv_head, S) = inputs.q.shape, inputs.k.shape[1:3]
    visible = np.broadcast_to(True if inputs.mask is None else inputs.mask, (B, nh, T, S))
    if inputs.causal:
        visible = visible & (np.arange(S) <= np.arange(T)[:, None] + S - T)
    random = np.random.default_rng(seed)
    t = int(random.integers(T))
    hidden = ~visible[:, :, t].reshape(B, n_kv_head, -1, S).any(axis=2)  # from query t
    before = call(attend, inputs)
    for x in (inputs.k, inputs.v):
        x[hidden] = random.normal(size=x[hidden].shape) * 1e6
    assert torch.equal(call(attend, inputs)[:, :, t], before[:, :, t])


def test_only_a_cpu_prefers_the_formula():
    """For dropout, and in half precision, but not at long contexts, whose scores are many."""
    for dtype, dropout in product((torch.float32, torch.bfloat16), (0.0, 0.1)):
        assert not prefer_formula("cuda", dtype, 64, dropout)
        assert prefer_formula("cpu", dtype, 64, dropout) == (bool(dropout) or dtype.itemsize == 2)
    assert not prefer_formula("cpu", torch.bfloat16, 4096, 0.0)


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
    assert_close(y, reference.rotary(x, positions, theta))
    assert_close(y.norm(dim=-1), np.linalg.norm(x, axis=-1))


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 20), seeds)
@settings(deadline=None, max_examples=30)
def test_rotated_products_depend_on_the_distance_only(m, n, shift, seed):
    q, k = np.random.default_rng(seed).normal(size=(2, 1, 6))

    def product(i, j):
        return (turned(q, [i]) * turned(k, [j])).sum()

    assert_close(product(m + shift, n + shift), product(m, n))


@pytest.mark.parametrize(("theta", "hs"), [(10_000.0, 64), (1_000_000.0, 128), (500_000.0, 128)])
def test_rotary_angles_are_those_of_other_implementations_to_the_last_bit(theta, hs):
    """transformers rounds 1 / theta^(i / hs). With theta^(-i / hs) angles at position 27,000 were
    2e-3 apart, and the logits of a Llama drifted. (And bfloat16 has no position 257.)
    """
    positions = torch.arange(0, 40_000, 9)
    inverse = 1.0 / (theta ** (torch.arange(0, hs, 2, dtype=torch.int64).float() / hs))
    angles = torch.outer(positions.float(), inverse)
    cos, sin = rotary_angles(positions, hs, theta)
    assert torch.equal(cos, angles.cos())
    assert torch.equal(sin, angles.sin())


def test_position_0_is_not_turned_and_the_precision_of_what_is_turned_stays():
    x = torch.randn(2, 3, 1, 6, dtype=torch.bfloat16)
    y = rotate(x, rotary_angles(torch.zeros(1), 6))
    assert y.dtype == x.dtype
    assert torch.equal(y, x)


# The cache


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), seeds)
@settings(deadline=None, max_examples=20)
def test_a_cache_returns_all_that_was_appended_in_order(lengths, seed):
    """And takes its memory once."""
    k, v = torch.from_numpy(np.random.default_rng(seed).normal(size=(2, 2, 3, sum(lengths), 7)))
    cache, end, addresses = KVCache(max_length=25), 0, set()
    for n in lengths:
        start, end = end, end + n
        seen_k, seen_v = cache.append(k[:, :, start:end], v[:, :, start:end])
        addresses.add((seen_k.data_ptr(), seen_v.data_ptr()))
        assert cache.length == end
        assert torch.equal(seen_k, k[:, :, :end])
        assert torch.equal(seen_v, v[:, :, :end])
    assert len(addresses) == 1
    assert cache.k.shape == cache.v.shape == (2, 3, 25, 7)


# The module


@st.composite
def modules(draw, **fixed):
    """A MultiHeadAttention in float64, its formula, its input x, and cos and sin of its angles."""
    n_head, n_kv_head = draw(head_counts)
    rotary, head_size = draw(st.booleans()), draw(st.sampled_from([4, 6]))
    causal, norm_eps, seed = draw(st.booleans()), draw(st.sampled_from([1e-5, 0.1])), draw(seeds)
    shape = {"n_kv_head": n_kv_head, "head_size": head_size, "causal": causal}
    module = MultiHeadAttention(
        7,
        n_head,
        bias=draw(st.booleans()),
        qk_norm=draw(st.sampled_from([nn.Identity, partial(RMSNorm, eps=norm_eps)])),
        **shape | {"dropout": 0.0} | fixed,
    )
    scramble(module.double(), seed)
    start = draw(st.sampled_from([0, 3]))
    positions = angles = None
    if rotary:
        positions = np.arange(start, start + 5)
        angles = torch.stack(rotary_angles(torch.from_numpy(positions), head_size, 10.0))
    twin = shape | {
        "params": weights_of(module),
        "n_head": n_head,
        "rope_theta": 10.0 if rotary else None,
        "positions": positions,
        "norm_eps": norm_eps,
    }
    x = np.random.default_rng(seed).normal(size=(2, 5, 7))
    formula = partial(reference.multi_head_attention, **twin)
    return Drawn(module=module, formula=formula, x=x, angles=angles, n_head=n_head, **shape)


@both_paths
@given(modules(), st.booleans(), seeds)
@settings(deadline=None, max_examples=40)
def test_multi_head_attention_is_its_formula(path, drawn, masked, seed):
    mask = None
    if masked:
        mask = (np.random.default_rng(seed).random((2, 1, 5, 5)) < 0.5) | np.eye(5, dtype=bool)
    with attention_by(path):
        y = drawn.module(*to_torch(drawn.x), angles=drawn.angles, mask=to_torch(mask)[0])
    tol = 1e-10 if drawn.angles is None else 1e-5  # angles are fp32
    assert_close(y, drawn.formula(drawn.x, mask=mask), tol)


@both_paths
@given(modules(dropout=0.5))
@settings(deadline=None, max_examples=15)
def test_dropout_falls_on_the_weights_in_training_only(path, drawn):
    (x,) = to_torch(drawn.x)
    with attention_by(path):
        y = drawn.module.eval()(x, angles=drawn.angles)
        assert_close(y, drawn.formula(drawn.x))
        torch.manual_seed(0)
        assert not torch.allclose(drawn.module.train()(x, angles=drawn.angles), y)


@both_paths
@given(modules(causal=True), st.integers(1, 4))
@settings(deadline=None, max_examples=20)
def test_a_module_with_a_cache_reads_a_sequence_in_two_parts(path, drawn, cut):
    (x,) = to_torch(drawn.x)
    cache, parts = KVCache(max_length=7), []
    with attention_by(path):
        whole = drawn.module(x, angles=drawn.angles)
        for part in (slice(0, cut), slice(cut, None)):
            turn = None if drawn.angles is None else drawn.angles[:, part]
            parts.append(drawn.module(x[:, part], angles=turn, cache=cache))
    assert_close(torch.cat(parts, dim=1), whole, 1e-10)
