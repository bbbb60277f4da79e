"""Laws of the optimizer and of the learning rate."""

import io
import math
from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import assert_close
from strategies import torch_seeded

from nanolm.layers import ModelConfig
from nanolm.model import GPT
from nanolm.optim import (
    OPTIMIZERS,
    SCHEDULES,
    adam_direction,
    learning_rate,
    orthogonalize,
    parameter_groups,
)

SEEDS = st.integers(0, 1000)
BETAS = (0.9, 0.95)
CONFIG = ModelConfig(vocab_size=11, block_size=7, n_layer=2, n_head=1, n_embd=6, bias=True)


SHAPES = ((3, 5), (5, 3), (4, 4), (7,))  # the first two are hidden matrices of one batch


def groups_of(parameters, decay):
    """Four parameters of these shapes, as parameter_groups would sort them."""
    return [
        {"params": parameters[2:3], "weight_decay": decay},
        {"params": parameters[3:], "weight_decay": 0.0},
        {"params": parameters[:2], "weight_decay": decay, "hidden": True},
    ]


@pytest.mark.parametrize("name", OPTIMIZERS)
@settings(deadline=None, max_examples=20)
@given(SEEDS, st.floats(1e-5, 1e-1), st.floats(0, 0.5), st.integers(1, 4))
def test_every_optimizer_is_its_formula(name, seed, lr, weight_decay, steps):
    """Muon's for the hidden matrices alone."""
    random = np.random.default_rng(seed)
    weights = [random.normal(size=shape) for shape in SHAPES]
    memories = [(np.zeros_like(w), np.zeros_like(w)) for w in weights]
    parameters = [torch.nn.Parameter(torch.tensor(w)) for w in weights]
    optimizer = OPTIMIZERS[name](groups_of(parameters, weight_decay), lr=lr, betas=BETAS)
    for step in range(1, steps + 1):
        for i, parameter in enumerate(parameters):
            gradient = random.normal(size=SHAPES[i])
            parameter.grad = torch.tensor(gradient)
            formula = reference.OPTIMIZERS["adamw" if name == "muon" and i > 1 else name]
            options = {"lr": lr, "betas": BETAS, "weight_decay": weight_decay * (i < 3)}
            update = formula(weights[i], gradient, *memories[i], step, **options)
            weights[i], *memories[i] = update
        optimizer.step()
    for parameter, weight in zip(parameters, weights, strict=True):
        assert_close(parameter, weight, 1e-9)


@pytest.mark.parametrize("name", OPTIMIZERS)
@settings(deadline=None, max_examples=5)
@given(SEEDS, st.integers(1, 3))
def test_a_fresh_optimizer_goes_on_from_what_a_file_says_of_another(name, seed, steps):
    """To the last bit; and a checkpoint holds no code, so what it remembers must be data."""
    random = torch_seeded(seed)

    def new():
        model = GPT(CONFIG)
        groups = parameter_groups(model, 0.1, name)
        return {"model": model, "optimizer": OPTIMIZERS[name](groups, lr=0.01, betas=BETAS)}

    def make_step(*runs):
        gradients = [torch.randn(p.shape, generator=random) for p in runs[0]["model"].parameters()]
        for run in runs:
            for p, gradient in zip(run["model"].parameters(), gradients, strict=True):
                p.grad = gradient.clone()
            run["optimizer"].step()

    first, second, file = new(), new(), io.BytesIO()
    for _ in range(steps):
        make_step(first)
    torch.save({key: part.state_dict() for key, part in first.items()}, file)
    file.seek(0)
    for key, content in torch.load(file, weights_only=True).items():
        second[key].load_state_dict(content)
    make_step(first, second)
    for a, b in zip(first["model"].parameters(), second["model"].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gradient_of_zero_moves_nothing(name):
    """Nor does it make NaN: there is no direction of length 1 in it."""
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    OPTIMIZERS[name](groups_of(parameters, 0.0), lr=0.1, betas=BETAS).step()
    assert all(torch.equal(p, torch.ones_like(p)) for p in parameters)


@given(st.sampled_from([1e-4, 1.0, 1e4]), st.integers(1, 5))
def test_a_constant_gradient_makes_adam_go_by_its_sign(scale, steps):
    """Whatever its scale, and from the first step on, when the running means began with zeros."""
    p, memory = torch.zeros(3), {}
    p.grad = scale * torch.tensor([1.0, -2.0, 0.0])
    for _ in range(steps):
        direction = adam_direction(p, memory, BETAS)
    assert_close(direction, torch.tensor([1.0, -1.0, 0.0]), 1e-3)


@given(SEEDS, st.integers(1, 4))
def test_adam_s_direction_is_its_formula(seed, steps):
    random, p, memory = np.random.default_rng(seed), torch.zeros(5, dtype=torch.float64), {}
    means = np.zeros(5), np.zeros(5)
    for step in range(1, steps + 1):
        gradient = random.normal(size=5)
        p.grad = torch.tensor(gradient)
        expected, *means = reference.adam_direction(gradient, *means, step, BETAS)
        assert_close(adam_direction(p, memory, BETAS), expected, 1e-9)


def test_lamb_moves_a_tensor_of_zeros_by_the_rate():
    """Its length gives no scale, so the step is taken as it is, and weights can leave 0 at all."""
    p = torch.nn.Parameter(torch.zeros(3, 5))
    p.grad = torch.ones(3, 5)
    OPTIMIZERS["lamb"]([{"params": [p], "weight_decay": 0.0}], lr=0.1, betas=BETAS).step()
    assert_close(p, torch.full((3, 5), -0.1))


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


def grouped(model, optimizer):
    """The names of the parameters in each group, and the groups' weight decay."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, 0.1, optimizer)
    found = [[names[id(p)] for p in group["params"]] for group in groups]
    assert sorted(name for group in found for name in group) == sorted(names.values())  # once
    return found, [group["weight_decay"] for group in groups]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_matrices_decay_and_vectors_do_not(optimizer):
    model = GPT(CONFIG)
    found, decays = grouped(model, optimizer)
    shapes = dict(model.named_parameters())
    for names, decay in zip(found, decays, strict=True):
        assert {shapes[name].dim() for name in names} == ({2} if decay else {1})


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_muon_takes_every_matrix_but_embeddings_and_the_head_whatever_its_name(tie_embeddings):
    """It took those whose names begin with "blocks."; an encoder's would have been left out."""
    model = GPT(replace(CONFIG, qk_norm=True, tie_embeddings=tie_embeddings))
    model.encoder, model.blocks = model.blocks, torch.nn.ModuleList()
    (tables, _, hidden), _ = grouped(model, "muon")
    head = [] if tie_embeddings else ["head.weight"]
    assert tables == ["tokens.weight", "positions.weight", *head]
    assert {name.split(".")[0] for name in hidden} == {"encoder"}
    assert {name.split(".")[2] for name in hidden} == {"attn", "mlp"}


plans = st.fixed_dictionaries(
    {
        "schedule": st.sampled_from(sorted(SCHEDULES)),
        "peak": st.floats(1e-4, 1.0),
        "warmup_iters": st.integers(0, 30),
        "decay_iters": st.integers(1, 100),
        "cooldown_iters": st.integers(1, 100),
    }
)
ITERS = {"warmup_iters": 4, "decay_iters": 9, "cooldown_iters": 2}
PLAN = {"schedule": "cosine", "peak": 1.0, **ITERS}


@pytest.mark.parametrize("name", SCHEDULES)
@given(st.integers(0, 30), st.integers(1, 100), st.integers(1, 100), st.data())
def test_every_schedule_falls_from_1_by_its_formula(name, start, length, cooldown, data):
    end = start + length
    iters = {"warmup_iters": start, "decay_iters": end, "cooldown_iters": cooldown}
    assert SCHEDULES[name](start, **iters) == pytest.approx(1)
    step = data.draw(st.integers(start, end - 1), "step")
    expected = reference.SCHEDULES[name](step, **iters)
    assert SCHEDULES[name](step, **iters) == pytest.approx(expected, abs=1e-12)


@given(plans, st.floats(0, 1), st.integers(0, 150))
def test_the_learning_rate_is_the_formula(plan, share, step):
    floor = share * plan["peak"]
    rate = learning_rate(step, floor=floor, **plan)
    expected = reference.learning_rate(step, floor=floor, **plan)
    assert rate == pytest.approx(expected, rel=1e-9, abs=1e-15)


@example(PLAN, 0.5, 0)
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
        fall = min(plan["cooldown_iters"], end - start)  # in which a schedule may come down
        steepest = max(math.pi / 2 * plan["peak"] / fall, plan["peak"] / (start + 1))
        smooth = rates[:end] if plan["schedule"] == "inverse_sqrt" else rates
        assert max(abs(np.diff(smooth)), default=0) <= steepest * (1 + 1e-9)
        assert max(rates) == pytest.approx(plan["peak"])
    assert np.all(np.diff(rates[:start]) > 0)
    assert np.all(np.diff(rates[start:]) <= 1e-12)
