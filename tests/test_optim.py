"""Laws of the optimizer and of the learning rate."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanolm.model import GPT, ModelConfig
from nanolm.optim import OPTIMIZERS, SCHEDULES, learning_rate, parameter_groups

SEEDS = st.integers(0, 1000)


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.floats(1e-5, 1e-1), st.floats(0, 0.5), st.integers(1, 4))
def test_adamw_is_the_formula(seed, lr, weight_decay, steps):
    random = np.random.default_rng(seed)
    weights = [random.normal(size=(3, 5)), random.normal(size=7)]
    parameters = [torch.nn.Parameter(torch.tensor(w)) for w in weights]
    groups = [
        {"params": [parameters[0]], "weight_decay": weight_decay},
        {"params": [parameters[1]], "weight_decay": 0.0},
    ]
    optimizer = OPTIMIZERS["adamw"](groups, lr=lr, betas=(0.9, 0.95))
    moments = [(np.zeros_like(w), np.zeros_like(w)) for w in weights]
    for step in range(1, steps + 1):
        gradients = [random.normal(size=w.shape) for w in weights]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = torch.tensor(gradient)
        optimizer.step()
        for i, decay in enumerate((weight_decay, 0.0)):
            weights[i], *moments[i] = reference.adamw(
                weights[i], gradients[i], *moments[i], step, lr, 0.9, 0.95, 1e-8, decay
            )
    for parameter, weight in zip(parameters, weights, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), weight, rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.floats(0.01, 10))
def test_clipping_is_the_formula(seed, max_norm):
    random = np.random.default_rng(seed)
    gradients = [random.normal(size=shape) for shape in ((3, 5), (7,))]
    parameters = [torch.nn.Parameter(torch.zeros(g.shape, dtype=torch.float64)) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.tensor(gradient)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    clipped, expected = reference.clip(gradients, max_norm)
    assert norm.item() == pytest.approx(expected)
    for parameter, gradient in zip(parameters, clipped, strict=True):
        np.testing.assert_allclose(parameter.grad.numpy(), gradient, rtol=1e-5)


def test_matrices_decay_and_vectors_do_not():
    config = ModelConfig(vocab_size=11, block_size=7, n_layer=2, n_head=1, n_embd=6, bias=True)
    model = GPT(config)
    decayed, kept = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(names[id(p)].endswith("weight") for p in decayed["params"])
    assert {p.dim() for p in kept["params"]} == {1}
    grouped = [*decayed["params"], *kept["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))  # each once


plans = st.fixed_dictionaries(
    {
        "schedule": st.sampled_from(sorted(SCHEDULES)),
        "peak": st.floats(1e-4, 1.0),
        "warmup_iters": st.integers(0, 30),
        "decay_iters": st.integers(1, 100),
        "cooldown_iters": st.integers(1, 100),
    }
)


@given(plans, st.floats(0, 1), st.integers(0, 150))
def test_the_learning_rate_is_the_formula(plan, share, step):
    floor = share * plan["peak"]
    rate = learning_rate(step, floor=floor, **plan)
    arguments = (step, plan["peak"], floor, plan["warmup_iters"], plan["decay_iters"])
    if plan["schedule"] == "cosine":
        expected = reference.cosine_schedule(*arguments)
    else:
        expected = reference.trapezoid_schedule(*arguments, plan["cooldown_iters"])
    assert rate == pytest.approx(expected, rel=1e-9, abs=1e-15)


@given(plans, st.floats(0.01, 1), st.integers(0, 150))
def test_the_learning_rate_is_positive_and_at_most_its_peak(plan, share, step):
    """Also at step 0, and where warm-up and decay end at the same step."""
    rate = learning_rate(step, floor=share * plan["peak"], **plan)
    assert 0 < rate <= plan["peak"] * (1 + 1e-12)


@given(plans, st.floats(0, 1))
def test_the_learning_rate_has_no_jumps_and_ends_at_its_floor(plan, share):
    floor, start, end = share * plan["peak"], plan["warmup_iters"], plan["decay_iters"]
    rates = [learning_rate(step, floor=floor, **plan) for step in range(151)]
    assert all(rate == pytest.approx(floor) for rate in rates[max(start, end) :])
    if start < end:
        longest = max(1, min(plan["cooldown_iters"], end - start))
        slope = plan["peak"] / (longest if plan["schedule"] == "trapezoid" else end - start)
        steepest = max(math.pi / 2 * slope, plan["peak"] / (start + 1))
        assert max(abs(np.diff(rates))) <= steepest * (1 + 1e-9)
        assert max(rates) == pytest.approx(plan["peak"])
    assert np.all(np.diff(rates[:start]) > 0)
    assert np.all(np.diff(rates[start:]) <= 1e-12)
