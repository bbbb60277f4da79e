"""Laws of the update and of the loop."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_close
from strategies import random_model, seeds
from test_model import any_config, some_batch

from nanolm.layers import ModelConfig
from nanolm.model import GPT
from nanolm.optim import adamw, parameter_groups
from nanolm.parallel import ALONE, World
from nanolm.precision import CPU, Engine
from nanolm.training import (
    TrainState,
    dropout_seed,
    recompute_blocks,
    target_shares,
    train,
    update,
)

CONFIG = ModelConfig(vocab_size=11, block_size=7, n_layer=1, n_head=2, n_embd=6)
DROPOUT = replace(CONFIG, dropout=0.5)


def new_state(config=CONFIG, seed=0, dtype="float32", lr=1e-2) -> TrainState:
    torch.manual_seed(seed)
    model = GPT(config)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == "float16")
    optimizer = adamw(parameter_groups(model, 0.1), lr=lr, betas=(0.9, 0.99))
    return TrainState(model, optimizer, scaler=scaler)


def random_batch(seed, batch_size=4, vocab_size=11, block_size=7, hidden=0.0):
    """Ids and targets; a share of the targets is hidden (-1)."""
    random = np.random.default_rng(seed)
    ids, targets = random.integers(vocab_size, size=(2, batch_size, block_size))
    return {"ids": ids, "targets": np.where(random.random(targets.shape) < hidden, -1, targets)}


def gradients(micro_batches, dtype="float32", **options):
    """Loss, norm and gradient of an update: with plain SGD at rate 1 the weights move by it."""
    state = new_state(dtype=dtype)
    state.optimizer = torch.optim.SGD(state.model.parameters())
    before = [p.detach().clone() for p in state.model.parameters()]
    options = {"grad_clip": 0, "engine": Engine("cpu", dtype, compile=False)} | options
    loss, norm, _ = update(state, micro_batches, learning_rate=1.0, **options)
    pairs = zip(before, state.model.parameters(), strict=True)
    return loss, norm, [(a - b).detach().numpy() for a, b in pairs]


def test_the_shares_of_micro_batches_are_those_of_their_targets():
    """Token 0 is a target as any other; -1 is none."""
    rows = ([3, 0, 5, 1], [-1, -1, 0, -1], [-1, -1, -1, -1])
    batches = [{"ids": np.array([row]), "targets": np.array([row])} for row in rows]
    assert target_shares(batches) == pytest.approx([0.8, 0.2, 0.0])
    assert target_shares(batches[2:]) == [0.0]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 999), st.sampled_from([0.0, 0.3, 0.9, 1.0]))
def test_micro_batches_add_up_to_the_gradient_of_the_whole_batch(seed, hidden):
    """Also where the targets are spread unevenly over them, and where one has none."""
    batch = random_batch(seed, hidden=hidden)
    batch["targets"][2] = -1
    loss, _, whole = gradients([batch])
    rows = [{name: part[i : i + 1] for name, part in batch.items()} for i in range(4)]
    cut_loss, _, cut = gradients(rows)
    assert cut_loss == pytest.approx(loss, abs=1e-5)
    for a, b in zip(cut, whole, strict=True):
        assert_close(a, b)


@dataclass
class Kept:
    """Counts the numbers that a forward pass keeps for the backward pass."""

    sizes: dict[int, int] = field(default_factory=dict)  # by where they lie, each once

    def note(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    def of(self, model, batch) -> int:
        with torch.autograd.graph.saved_tensors_hooks(self.note, lambda x: x):
            model(**batch)[1].backward()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(size for place, size in self.sizes.items() if place not in weights)


@settings(max_examples=20)
@given(any_config, seeds, st.sampled_from([0.0, 0.3]))
def test_blocks_that_are_computed_again_learn_the_same(config, seed, dropout):
    """Bit for bit, with the same dropout."""
    config = replace(config, dropout=dropout)
    model, batch, found = random_model(config, seed).train(), some_batch(config, seed), []
    twin = copy.deepcopy(model)
    recompute_blocks(twin)
    for one in (model, twin):
        torch.manual_seed(seed)
        loss = one(**batch)[1]
        loss.backward()
        found.append([loss, *(p.grad for p in one.parameters())])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_blocks_that_are_computed_again_keep_little():
    config = replace(CONFIG, n_layer=8, n_embd=32, block_size=32)
    kept = []
    for again in (False, True):
        model = GPT(config).train()
        if again:
            recompute_blocks(model)
        batch = random_batch(0, batch_size=8, block_size=32)
        kept.append(Kept().of(model, {key: torch.from_numpy(x) for key, x in batch.items()}))
    assert kept[1] < kept[0] / 4


def test_dropout_seeds_differ_for_every_micro_batch():
    """And they are the same when they are asked for again, as after resuming."""
    assert dropout_seed(1, 2, 3) == dropout_seed(1, 2, 3)
    seeds = {dropout_seed(s, t, j) for s in range(5) for t in range(20) for j in range(5)}
    assert len(seeds) == 5 * 20 * 5


def test_dropout_depends_on_the_step_and_not_on_the_random_numbers_drawn_before():
    losses = []
    for step, noise in ((0, 0), (0, 1), (1, 0)):
        state = new_state(DROPOUT)
        state.step = step
        torch.manual_seed(noise)
        losses.append(update(state, [random_batch(0)], learning_rate=0.1, seed=3)[0])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("grad_clip", [0.01, 1e9])
def test_the_gradient_is_clipped_by_the_formula(grad_clip, dtype):
    """In float16 that of the loss itself, not of the scaled one; AdamW, which asks for no scale,
    would hide it.
    """
    _, norm, whole = gradients([random_batch(0)], dtype)
    expected, length = reference.clip(whole, grad_clip)
    assert norm == pytest.approx(length, rel=1e-3)
    _, _, clipped = gradients([random_batch(0)], dtype, grad_clip=grad_clip)
    for a, b in zip(clipped, expected, strict=True):
        assert_close(a, b, 1e-6)


def test_the_loss_falls_by_the_gradient_times_the_step():
    """To first order, a small step along the gradient lowers the loss by rate * norm squared."""
    state = new_state()
    state.optimizer = torch.optim.SGD(state.model.parameters(), lr=1.0)
    first, norm, _ = update(state, [random_batch(0)], learning_rate=1e-3, grad_clip=0)
    second, _, _ = update(state, [random_batch(0)], learning_rate=0, grad_clip=0)
    assert first - second == pytest.approx(1e-3 * norm**2, rel=0.05)


# ------------------------------------------------------------------------------------------
# What is not finite


def poison(state, value):
    """Make the loss non-finite by a bad weight; returns an undo."""
    weight = state.model.norm.weight
    saved = weight.detach().clone()
    weight.data[0] = value
    return lambda: weight.data.copy_(saved)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_counted_and_not_applied(value):
    state = new_state()
    undo = poison(state, value)
    before = copy.deepcopy(state.model.state_dict())
    loss, norm, _ = update(state, [random_batch(0)], learning_rate=0.1)
    assert not (math.isfinite(loss) and math.isfinite(norm))
    assert (state.step, state.skipped) == (1, 1)
    after = state.model.state_dict()
    assert all(torch.equal(before[key].nan_to_num(), after[key].nan_to_num()) for key in before)
    assert not state.optimizer.state  # its moments are clean, too
    undo()
    update(state, [random_batch(0)], learning_rate=0.1)
    assert (state.step, state.skipped) == (2, 0)


@dataclass
class LoopRun:
    """A run that only notes what the loop asks of it."""

    state: TrainState
    config: SimpleNamespace
    engine: Engine = CPU
    world: World = ALONE
    batches: Callable = lambda step: [random_batch(step)]
    losses: list = field(default_factory=list)
    evaluations: list = field(default_factory=list)
    answered: list = field(default_factory=list)
    asked: tuple = ()  # the steps in which a signal comes

    def micro_batches(self, step):
        return self.batches(step)

    def evaluate(self):
        self.evaluations.append(self.state.step)

    def report(self, step, loss, **numbers):
        self.losses.append(loss)

    def requests(self):
        return [self.state.step in self.asked, False]

    def answer(self, requested):
        self.answered.append((self.state.step, requested))


def loop(state, max_iters, eval_interval=100, **options) -> LoopRun:
    """Run the loop."""
    keys = {"max_iters": max_iters, "eval_interval": eval_interval, "grad_clip": 1.0, "seed": 0}
    run = LoopRun(state, SimpleNamespace(**keys, rate=lambda step: 0.01), **options)
    train(run)
    return run


def test_a_request_is_answered_once_after_the_update_in_which_it_comes():
    assert loop(new_state(), 6, asked=(2, 3)).answered == [(3, [True, False]), (4, [True, False])]


def test_three_updates_in_a_row_that_are_not_finite_end_the_run():
    state = new_state()
    poison(state, math.nan)
    with pytest.raises(ValueError, match=r"not finite, the last one in step 2 \(loss nan"):
        loop(state, 100)


def test_a_loss_scale_that_is_too_high_at_first_does_not_count():
    """GradScaler starts at 65536 and halves itself until fp16 gradients are finite."""
    state = new_state(dtype="float16")
    for p in state.model.parameters():
        p.register_hook(lambda g: (g * 2**12).half().float() / 2**12)  # overflows at first
    fp16 = Engine("cpu", "float16", compile=False)
    loop(state, 12, engine=fp16)
    assert state.skipped == 0
    assert state.scaler.get_scale() <= 65536 / 2**3  # it was skipped more often than is forgiven
    assert state.step == 12


def test_a_loss_scale_that_never_settles_ends_the_run():
    """Below a scale of 1, an infinite gradient is the model's own, and each one counts."""
    state = new_state(dtype="float16")
    state.model.norm.weight.register_hook(lambda g: g * math.inf)
    with pytest.raises(ValueError, match="not finite"):
        loop(state, 30, engine=Engine("cpu", "float16", compile=False))


# ------------------------------------------------------------------------------------------
# The loop


def test_the_loop_trains_with_dropout_whatever_mode_the_model_comes_in():
    """A model that was loaded to be looked at comes in eval mode."""
    fresh, looked_at = new_state(DROPOUT), new_state(DROPOUT)
    looked_at.model.eval()
    assert loop(looked_at, 2).losses == loop(fresh, 2).losses


@pytest.mark.parametrize(
    ("max_iters", "interval", "steps"),
    [(6, 2, [0, 2, 4, 6]), (7, 3, [0, 3, 6, 7]), (2, 5, [0, 2]), (0, 5, [0])],
)
def test_the_loop_makes_exactly_max_iters_updates_and_evaluates_at_the_end(
    max_iters, interval, steps
):
    state = new_state()
    run = loop(state, max_iters, interval)
    assert len(run.losses) == state.step == max_iters
    assert run.evaluations == steps


def test_a_saved_state_continues_as_if_it_had_never_stopped():
    whole, first, second = (new_state(DROPOUT, seed) for seed in (0, 0, 1))
    expected = loop(whole, 8).losses
    loop(first, 5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert loop(second, 8).losses == expected[5:]
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def copy_batch(step):
    """Six random tokens, twice; only the second six are asked for."""
    half = np.random.default_rng(step).integers(11, size=(32, 6))
    text = np.concatenate((half, half), axis=1)
    targets = text[:, 1:].copy()
    targets[:, :5] = -1
    return [{"ids": text[:, :-1], "targets": targets}]


def test_a_copy_task_is_learned_in_under_100_updates():
    config = ModelConfig(vocab_size=11, block_size=11, n_layer=2, n_head=2, n_embd=32, norm="rms")
    losses = loop(new_state(config), 100, batches=copy_batch).losses
    assert losses[0] > 2.2
    assert losses[-1] < 0.1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains_close_to_full_precision(dtype):
    expected = loop(new_state(), 4).losses
    half = loop(new_state(dtype=dtype), 4, engine=Engine("cpu", dtype, compile=False)).losses
    assert half == pytest.approx(expected, abs=0.03)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_gpu_trains_as_the_cpu_does(dtype):
    expected = loop(new_state(), 4).losses
    state = new_state()
    state.model.to("cuda")
    state.scaler = torch.amp.GradScaler("cuda", enabled=dtype == "float16")
    losses = loop(state, 4, engine=Engine("cuda", dtype, compile=False)).losses
    assert losses == pytest.approx(expected, abs=1e-3 if dtype == "float32" else 0.03)
