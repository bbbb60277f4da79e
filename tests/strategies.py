"""What the property tests draw from: small shapes, configs and arrays.

Every dimension has a prime of its own wherever it can, so that no swapped pair of axes fits by
chance. Numbers come from a drawn seed, which is faster than drawing each one and shrinks as well.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from nanolm.layers import HEADS, MLPS, NORMS, POSITIONS, ModelConfig
from nanolm.model import build_model

seeds = st.integers(0, 2**32 - 1)

# (n_head, n_kv_head): alone, equal, one shared by all, and two groupings whose heads are told
# apart only when they are repeated in the right order.
head_counts = st.sampled_from([(1, 1), (3, 3), (5, 1), (4, 2), (6, 3)])


@st.composite
def model_configs(draw, **fixed):
    """A small ModelConfig over all choices, without dropout; fixed: keys that are not drawn."""
    n_head, n_kv_head = draw(head_counts)
    position = draw(st.sampled_from(POSITIONS))
    derived = draw(st.booleans())  # the sizes that may be left to the config
    even = position == "rotary" or fixed.get("position") == "rotary"
    keys = {
        "vocab_size": draw(st.sampled_from([17, 19])),
        "block_size": draw(st.sampled_from([11, 13])),
        "n_layer": draw(st.integers(1, 3)),
        "n_head": n_head,
        "n_kv_head": None if derived else n_kv_head,
        "n_embd": n_head * 4 if derived else draw(st.sampled_from([5, 7])),
        "head_size": None if derived else draw(st.sampled_from([4, 6] if even else [2, 3])),
        "n_hidden": None if derived else draw(st.sampled_from([23, 29])),
        "bias": draw(st.booleans()),
        "norm": draw(st.sampled_from(list(NORMS))),
        "norm_eps": draw(st.sampled_from([1e-5, 0.1])),  # 0.1: a forgotten one is seen
        "position": position,
        "rope_theta": draw(st.sampled_from([10.0, 100.0])),
        "mlp": draw(st.sampled_from(list(MLPS))),
        "qk_norm": draw(st.booleans()),
        "tie_embeddings": draw(st.booleans()),
        "norm_first": draw(st.booleans()),
        "scale_embeddings": draw(st.booleans()),
    }
    return ModelConfig(**keys | fixed)


def encoder_configs(**fixed):
    """The same for encoders, with each head."""
    kinds = st.fixed_dictionaries(
        {"n_types": st.sampled_from([0, 3]), "head": st.sampled_from(HEADS)}
    )
    return kinds.flatmap(
        lambda keys: model_configs(
            causal=False, labels=("a", "b", "c") * (keys["head"] != "tokens"), **keys | fixed
        )
    )


def pair_configs(**fixed):
    """The same for an encoder and a decoder that looks at it."""
    layers = st.sampled_from([1, 2])
    return layers.flatmap(lambda n: model_configs(n_encoder_layer=n, start_id=3, **fixed))


class Drawn(SimpleNamespace):
    """What was drawn for one example; a failure prints the shapes of arrays, not the numbers."""

    def __repr__(self):
        shown = {name: getattr(value, "shape", value) for name, value in vars(self).items()}
        words = [f"{name}={value}" for name, value in shown.items() if not callable(value)]
        return f"Drawn({', '.join(words)})"


@st.composite
def attention_inputs(draw):
    """q, k, v as float64 arrays, causal, and mask (None or booleans that broadcast).

    Every query sees some key.
    """
    n_head, n_kv_head = draw(head_counts)
    B, hs, T = 2, draw(st.sampled_from([1, 5, 8])), draw(st.sampled_from([1, 3, 7]))
    causal = draw(st.booleans())
    S = draw(st.sampled_from([T, 11, 13] if causal else [1, T, 11, 13]))
    random = np.random.default_rng(draw(seeds))
    q = random.normal(size=(B, n_head, T, hs)) * 2
    k, v = random.normal(size=(2, B, n_kv_head, S, hs))
    mask = None
    if draw(st.booleans()):
        leading = draw(st.sampled_from([(B, n_head), (B, 1), (1, 1), ()]))
        mask = random.random((*leading, T, S)) < 0.5
        own = (np.arange(T) + S - T) % S  # with causal: the key at the query's own position
        mask[..., np.arange(T), own] = True
    return Drawn(q=q, k=k, v=v, causal=causal, mask=mask)


def to_torch(*arrays, dtype=torch.float64):
    """Arrays as tensors: floats in the given precision, others and None as they are."""
    tensors = [a if a is None else torch.from_numpy(np.ascontiguousarray(a)) for a in arrays]
    return [t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors]


def torch_seeded(seed):
    """A generator of its own for random tensors: the global one stays untouched."""
    return torch.Generator().manual_seed(seed)


def random_tokens(config, seed, batch=2, length=None):
    """Token ids, (batch, length or block_size)."""
    shape = (batch, config.block_size if length is None else length)
    return torch.randint(config.vocab_size, shape, generator=torch_seeded(seed))


@torch.no_grad()
def scramble(module, seed, scale=0.3):
    """Add noise to every weight, so that biases are not 0, norms not 1, and no weight is idle."""
    generator = torch_seeded(seed)
    for p in module.parameters():
        p += scale * torch.randn(p.shape, generator=generator).to(p.dtype)
    return module


def random_model(config, seed):
    """A model in float64 and eval mode, with weights that are large enough to matter."""
    return scramble(build_model(config).double().eval(), seed)


def weights_of(module):
    """The state dict as float64 arrays."""
    return {name: w.detach().double().numpy() for name, w in module.state_dict().items()}


@contextmanager
def attention_by(path):
    """Within this, modules attend by the "formula" or by the "fused" kernels, whatever is faster.

    (Hypothesis runs many examples in one test, which a monkeypatch fixture would outlive.)
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanolm.attention.prefer_formula", lambda *_: path == "formula")
        yield


both_paths = pytest.mark.parametrize("path", ["formula", "fused"])
