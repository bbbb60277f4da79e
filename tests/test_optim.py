"""Laws of the optimizer and of the learning rate."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanolm.layers import ModelConfig
from nanolm.model import GPT
from nanolm.optim import OPTIMIZERS, SCHEDULES, learning_rate, orthogonalize, parameter_groups

SEEDS = st.integers(0, 1000)


class Twin:
    """An optimizer of nanolm and one of NumPy, over the same weights (matrices and a vector)."""

    SHAPES = ((3, 5), (5, 3), (4, 4), (3, 5), (7,))

    def __init__(self, name: str, seed: int, lr: float, decay: float, betas=(0.9, 0.95)):
        self.name, self.lr, self.betas = name, lr, betas
        self.random = np.random.default_rng(seed)
        self.weights = [self.random.normal(size=shape) for shape in self.SHAPES]
        self.memories = [(np.zeros_like(w), np.zeros_like(w)) for w in self.weights]
        self.parameters = [torch.nn.Parameter(torch.tensor(w)) for w in self.weights]
        self.decays = [decay] * 4 + [0.0]
        groups = [
            {"params": self.parameters[:2], "weight_decay": decay},
            {"params": self.parameters[4:], "weight_decay": 0.0},
            {"params": self.parameters[2:4], "weight_decay": decay},
        ]
        if name == "muon":
            groups[0]["hidden"] = True  # two shapes that make one batch
        self.optimizer = OPTIMIZERS[name](groups, lr=lr, betas=betas)

    def update(self, step: int) -> None:
        """One update of both, with the same random gradients; step counts from 1."""
        for i, parameter in enumerate(self.parameters):
            gradient = self.random.normal(size=self.SHAPES[i])
            parameter.grad = torch.tensor(gradient)
            hidden = self.name == "muon" and i < 2
            formula = getattr(
                reference, "adamw" if self.name == "muon" and not hidden else self.name
            )
            self.weights[i], *self.memories[i] = formula(
                self.weights[i],
                gradient,
                *self.memories[i],
                step,
                lr=self.lr,
                betas=self.betas,
                weight_decay=self.decays[i],
            )
        self.optimizer.step()

    def check(self) -> None:
        for parameter, weight in zip(self.parameters, self.weights, strict=True):
            np.testing.assert_allclose(parameter.detach().numpy(), weight, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
@settings(deadline=None, max_examples=20)
@given(SEEDS, st.floats(1e-5, 1e-1), st.floats(0, 0.5), st.integers(1, 4))
def test_every_optimizer_is_its_formula(name, seed, lr, weight_decay, steps):
    twin = Twin(name, seed, lr, weight_decay)
    for step in range(1, steps + 1):
        twin.update(step)
    twin.check()


def test_lamb_moves_a_tensor_of_zeros_by_the_rate():
    """Its length gives no scale, so the step is taken as it is, and weights can leave 0 at all."""
    p = torch.nn.Parameter(torch.zeros(3, 5))
    p.grad = torch.ones(3, 5)
    OPTIMIZERS["lamb"]([{"params": [p], "weight_decay": 0.0}], lr=0.1, betas=(0.9, 0.95)).step()
    assert torch.allclose(p, torch.full((3, 5), -0.1))
    still = torch.nn.Parameter(torch.ones(3))
    still.grad = torch.zeros(3)
    OPTIMIZERS["lamb"](
        [{"params": [still], "weight_decay": 0.0}], lr=0.1, betas=(0.9, 0.95)
    ).step()
    assert torch.equal(still, torch.ones(3))


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.sampled_from([(3, 5), (5, 5), (16, 48)]))
def test_orthogonalizing_makes_singular_values_alike_and_keeps_the_directions(seed, shape):
    matrix = torch.from_numpy(np.random.default_rng(seed).normal(size=shape))
    result = orthogonalize(matrix[None])[0]
    u, s, vt = np.linalg.svd(matrix.numpy(), full_matrices=False)
    found = u.T @ result.numpy() @ vt.T  # diagonal, where the directions are the same
    values = np.diag(found)
    np.testing.assert_allclose(found, np.diag(values), atol=1e-6)
    clear = s > 0.02 * np.linalg.norm(s)  # smaller ones are on their way up
    assert (values[clear] > 0.6).all()
    assert (values < 1.3).all()


@settings(deadline=None, max_examples=10)
@given(SEEDS, st.integers(1, 3))
def test_muon_is_that_of_pytorch(seed, steps):
    """Which computes its matrix products in bfloat16, and one matrix after the other."""
    torch.manual_seed(seed)
    shapes = [(32, 96), (96, 32), (32, 32), (32, 96)]
    ours, theirs = ([torch.nn.Parameter(torch.zeros(shape)) for shape in shapes] for _ in range(2))
    muon = OPTIMIZERS["muon"](
        [{"params": ours, "weight_decay": 0.1, "hidden": True}], lr=0.1, betas=(0.95, 0.95)
    )
    other = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(steps):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            muon.step()
        other.step()
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 0.05 * b.norm()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_from_its_saved_state(name):
    whole, first, second = (Twin(name, 0, 0.01, 0.1) for _ in range(3))
    for step in range(1, 7):
        whole.update(step)
        (first if step <= 3 else second).update(step)
        if step == 3:
            second.optimizer.load_state_dict(first.optimizer.state_dict())
            second.random = first.random
            for old, new in zip(first.parameters, second.parameters, strict=True):
                new.data.copy_(old.data)
    for a, b in zip(whole.parameters, second.parameters, strict=True):
        assert torch.equal(a, b)


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


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_for_muon_the_matrices_of_the_blocks_stand_apart(tie_embeddings):
    keys = {"vocab_size": 11, "block_size": 7, "n_layer": 2, "n_head": 1, "n_embd": 6}
    model = GPT(ModelConfig(**keys, bias=True, qk_norm=True, tie_embeddings=tie_embeddings))
    tables, vectors, hidden = parameter_groups(model, 0.1, "muon")
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)] for p in tables["params"]}
    assert found == {"tokens.weight", "positions.weight"} | (
        set() if tie_embeddings else {"head.weight"}
    )
    assert {p.dim() for p in vectors["params"]} == {1}
    assert {names[id(p)].split(".")[2] for p in hidden["params"]} == {"attn", "mlp"}
    assert [g["weight_decay"] for g in (tables, vectors, hidden)] == [0.1, 0.0, 0.1]
    grouped = [p for group in (tables, vectors, hidden) for p in group["params"]]
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
