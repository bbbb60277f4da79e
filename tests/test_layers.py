"""The layers: each against its formula, and what a config may say."""

import dataclasses
import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_close
from strategies import model_configs, scramble, seeds, to_torch, weights_of

from nanolm.layers import MLPS, NORMS, POSITIONS, Block, GatedMLP, ModelConfig, gelu, sinusoids

TINY = ModelConfig(vocab_size=17, block_size=11, n_layer=2, n_head=2, n_embd=6)
GATED = [kind for kind in MLPS if issubclass(MLPS[kind].func, GatedMLP)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in MLPS if kind not in GATED])
@given(seed=seeds)
@settings(deadline=None, max_examples=10)
def test_every_mlp_is_its_formula(kind, bias, seed):
    check_mlp(kind, bias, seed)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", GATED)
@given(seed=seeds)
@settings(deadline=None, max_examples=10)
def test_every_mlp_with_a_gate_is_its_formula(kind, bias, seed):
    check_mlp(kind, bias, seed)


def check_mlp(kind, bias, seed):
    """It answers as its formula."""
    config = dataclasses.replace(TINY, mlp=kind, n_hidden=23, bias=bias)
    module = scramble(MLPS[kind](config).double(), seed)
    x = np.random.default_rng(seed).normal(size=(2, 3, 6)) * 3
    assert_close(module(*to_torch(x)), reference.mlp(x, weights_of(module), kind), 1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", NORMS)
@given(seed=seeds, eps=st.sampled_from([1e-5, 1.0]), scale=st.sampled_from([1e-3, 1.0, 1e3]))
@settings(deadline=None, max_examples=10)
def test_every_norm_is_its_formula(kind, bias, seed, eps, scale):
    """Also of tiny vectors, where eps is most of the variance."""
    config = dataclasses.replace(TINY, norm=kind, norm_eps=eps, bias=bias)
    module = scramble(NORMS[kind](config).double(), seed)
    x = np.random.default_rng(seed).normal(size=(2, 3, 6)) * scale + scale
    assert_close(module(*to_torch(x)), reference.NORMS[kind](x, weights_of(module), eps), 1e-10)


@pytest.mark.parametrize("kind", MLPS)
def test_every_activation_is_its_formula(kind):
    """And leaves what it is given as it was."""
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    before = x.clone()
    formula, _ = reference.MLPS[kind]
    assert_close(MLPS[kind].keywords["activation"](x), formula(before.numpy()), 1e-12)
    assert torch.equal(x, before)


def test_gelu_is_its_formula_in_a_compiler_too(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x = torch.linspace(-9, 9, 37, dtype=torch.float64)
    assert_close(gelu(x), reference.gelu_tanh(x.numpy()), 1e-12)


def test_the_tanh_form_of_gelu_is_within_a_thousandth_of_the_exact_one():
    x = np.linspace(-10, 10, 2001)
    assert_close(reference.gelu_tanh(x), reference.gelu_erf(x), 1e-4)


@given(st.integers(1, 50), st.integers(1, 23))
@settings(deadline=None, max_examples=30)
def test_sinusoids_are_their_formula(length, n_embd):
    """For an odd number of channels too."""
    found = sinusoids(length, n_embd)
    assert_close(found, reference.sinusoids(length, n_embd))
    assert found.dtype == torch.float32


@given(model_configs(norm_first=True), seeds, st.booleans())
@settings(deadline=None, max_examples=30)
def test_a_block_adds_what_its_residual_writers_write_and_nothing_else(config, seed, cross):
    """With those at 0 it passes its input on: none is forgotten, and each is one."""
    block = scramble(Block(config, causal=config.causal, cross=cross), seed)
    x, seen = torch.randn(2, 5, config.n_embd), torch.randn(2, 7, config.n_embd)
    look = {"memory": seen} if cross else {}
    writers = block.residual_writers()
    for writer in writers:
        assert not torch.equal(block(x, **look), x)
        for p in writer.parameters():
            p.data.zero_()
    assert torch.equal(block(x, **look), x)


@pytest.mark.parametrize("first", [True, False])
def test_a_block_normalizes_what_it_reads_or_else_the_sum(first):
    """And leaves its input as it was."""
    block = Block(dataclasses.replace(TINY, norm_first=first), causal=True)
    x, norm, change = torch.randn(2, 3, 6), torch.sin, torch.cos
    expected = x + change(norm(x)) if first else norm(x + change(x))
    before = x.clone()
    assert_close(block.add(x, change, norm), expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize("first", [True, False])
def test_a_block_drops_of_what_it_adds_alone(first):
    """With all of that dropped, its input is left."""
    block = Block(dataclasses.replace(TINY, norm_first=first, dropout=0.5), causal=True)
    block.dropout.p = 1.0
    x, norm, change = torch.randn(2, 3, 6), torch.sin, torch.cos
    assert_close(block.add(x, change, norm), x if first else norm(x))


# The config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for value in (0, -1) for key in (
            "vocab_size", "block_size", "n_layer", "n_head", "n_embd", "n_hidden", "n_kv_head",
            "head_size",
        )),
        ("dropout", 1.0), ("dropout", -0.1), ("dropout", math.nan),
        ("norm_eps", 0.0), ("norm_eps", -1e-5), ("rope_theta", 0.0), ("rope_theta", -1.0),
        ("n_embd", 770), ("n_kv_head", 5), ("n_kv_head", 24),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_by_key_and_value(key, value):
    with pytest.raises(ValueError, match=f"{key}={value!r}"):
        ModelConfig(**{key: value})


def test_rotary_positions_need_an_even_head_size():
    with pytest.raises(ValueError, match="head_size=3"):
        ModelConfig(position="rotary", n_embd=6, n_head=2)
    with pytest.raises(ValueError, match="head_size=5"):
        ModelConfig(position="rotary", head_size=5)
    assert ModelConfig(position="learned", head_size=5).head_size == 5


@pytest.mark.parametrize(
    ("key", "table"), [("norm", NORMS), ("position", POSITIONS), ("mlp", MLPS)]
)
def test_an_unknown_choice_is_answered_by_the_known_ones(key, table):
    with pytest.raises(ValueError, match=f"{key}='unheard-of': .*{', '.join(table)}"):
        ModelConfig(**{key: "unheard-of"})


@given(st.integers(1, 12), st.integers(1, 40), st.sampled_from(list(MLPS)))
@settings(deadline=None, max_examples=30)
def test_what_is_left_out_follows_from_the_rest(n_head, head_size, mlp):
    config = ModelConfig(n_head=n_head, n_embd=n_head * head_size, mlp=mlp)
    assert config.head_size == head_size
    assert config.n_kv_head == n_head
    if issubclass(MLPS[mlp].func, GatedMLP):  # 8/3 n_embd, rounded up to a multiple of 64
        assert config.n_hidden % 64 == 0
        assert 0 <= 3 * config.n_hidden - 8 * config.n_embd < 3 * 64
    else:
        assert config.n_hidden == 4 * config.n_embd


def test_what_is_given_is_kept():
    config = ModelConfig(n_embd=7, n_head=4, n_kv_head=2, head_size=3, n_hidden=5)
    assert (config.n_kv_head, config.head_size, config.n_hidden) == (2, 3, 5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_embd = 8
