"""Laws of the update and of the loop."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanolm.layers import ModelConfig
from nanolm.model import GPT
from nanolm.optim import adamw, parameter_groups
from nanolm.parallel import World
from nanolm.precision import Engine
from nanolm.training import (
    Prefetch,
    TrainState,
    accumulate_gradients,
    deal,
    dropout_seed,
    train,
    update,
)

CPU = Engine("cpu", "float32", compile=False)
CONFIG = ModelConfig(vocab_size=11, block_size=7, n_layer=1, n_head=2, n_embd=6)


def new_state(config=CONFIG, seed=0, dtype="float32", lr=1e-2) -> TrainState:
    torch.manual_seed(seed)
    model = GPT(config)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == "float16")
    optimizer = adamw(parameter_groups(model, 0.1), lr=lr, betas=(0.9, 0.99))
    return TrainState(model, model, optimizer, scaler)


def random_batch(seed, batch_size=4, vocab_size=11, block_size=7, hidden=0.0):
    """Ids and targets; a share of the targets is hidden (-1)."""
    random = np.random.default_rng(seed)
    ids, targets = random.integers(vocab_size, size=(2, batch_size, block_size))
    return {"ids": ids, "targets": np.where(random.random(targets.shape) < hidden, -1, targets)}


def gradients(state, micro_batches):
    loss = accumulate_gradients(state, deal(micro_batches, CPU), CPU, seed=0)
    return loss.item(), [p.grad.clone() for p in state.model.parameters()]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 999), st.sampled_from([0.0, 0.3, 0.9, 1.0]))
def test_micro_batches_add_up_to_the_gradient_of_the_whole_batch(seed, hidden):
    """Also where the targets are spread unevenly over them, and where one has none."""
    batch = random_batch(seed, hidden=hidden)
    batch["targets"][2] = -1
    loss, whole = gradients(new_state(), [batch])
    rows = [{name: part[i : i + 1] for name, part in batch.items()} for i in range(4)]
    cut_loss, cut = gradients(new_state(), rows)
    assert cut_loss == pytest.approx(loss, abs=1e-5)
    for a, b in zip(whole, cut, strict=True):
        assert torch.isfinite(b).all()
        assert (a - b).abs().max() <= 1e-5 * max(1, a.abs().max())


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), max_size=9), st.integers(1, 3))
def test_prefetching_gives_what_dealing_gives_whatever_was_prepared(calls, size):
    batches = [[random_batch(10 * step + j) for j in range(6)] for step in range(4)]
    world = World(rank=size - 1, size=size)
    dealt, source = [], lambda step: dealt.append(step) or batches[step]
    prefetch = Prefetch(source, CPU, world=world, end=4)
    for prepare, step in calls:
        if prepare:
            prefetch.prepare(step)
            continue
        for ours, share in zip(prefetch.take(step), deal(batches[step], CPU, world), strict=True):
            assert (ours.number, ours.weight) == (share.number, share.weight)
            for name in ("ids", "targets"):
                assert torch.equal(ours.batch[name], share.batch[name])
    assert len(dealt) <= len(calls)


def test_the_loop_deals_each_update_once_and_before_the_one_before_it_ends():
    """So that a GPU need not wait for its data."""
    seen, state = [], new_state()
    run_loop(
        state, 5, batches=lambda step: seen.append((step, state.step)) or [random_batch(step)]
    )
    assert seen == [(0, 0)] + [(step + 1, step) for step in range(4)]


def test_dropout_seeds_differ_for_every_micro_batch():
    seeds = {dropout_seed(s, t, j) for s in range(5) for t in range(20) for j in range(5)}
    assert len(seeds) == 5 * 20 * 5


def test_an_update_depends_on_the_step_and_not_on_the_random_numbers_drawn_before():
    config = ModelConfig(vocab_size=11, block_size=7, n_layer=1, n_head=2, n_embd=6, dropout=0.5)
    results = []
    for noise in (0, 1):
        state = new_state(config)
        torch.manual_seed(noise)
        update(state, deal([random_batch(0)], CPU), CPU, learning_rate=0.1, grad_clip=1.0, seed=3)
        results.append(state.model.state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_another_step_draws_other_dropout_masks():
    config = ModelConfig(vocab_size=11, block_size=7, n_layer=1, n_head=2, n_embd=6, dropout=0.5)
    losses = []
    for step in (0, 1):
        state = new_state(config)
        state.step = step
        losses.append(
            accumulate_gradients(state, deal([random_batch(0)], CPU), CPU, seed=0).item()
        )
    assert losses[0] != losses[1]


@pytest.mark.parametrize("grad_clip", [0.01, 0.0, 1e9])
def test_the_gradient_that_is_applied_is_no_longer_than_grad_clip(grad_clip):
    """With plain SGD at rate 1, the weights move by the clipped gradient."""
    state = new_state()
    state.optimizer = torch.optim.SGD(state.model.parameters(), lr=1.0)
    before = [p.detach().clone() for p in state.model.parameters()]
    knobs = {"learning_rate": 1.0, "grad_clip": grad_clip, "seed": 0}
    _, norm, _ = update(state, deal([random_batch(0)], CPU), CPU, **knobs)
    pairs = zip(before, state.model.parameters(), strict=True)
    moved = math.sqrt(sum(((a - b) ** 2).sum().item() for a, b in pairs))
    assert moved == pytest.approx(min(norm, grad_clip or math.inf), rel=1e-3)


def test_the_rate_that_is_given_is_the_rate_that_is_used():
    still, moving = new_state(), new_state()
    update(still, deal([random_batch(0)], CPU), CPU, learning_rate=0.0, grad_clip=1.0, seed=0)
    update(moving, deal([random_batch(0)], CPU), CPU, learning_rate=0.1, grad_clip=1.0, seed=0)
    fresh = new_state().model.state_dict()
    assert all(torch.equal(fresh[key], still.model.state_dict()[key]) for key in fresh)
    assert not torch.equal(fresh["tokens.weight"], moving.model.state_dict()["tokens.weight"])


def test_the_loss_falls_by_the_gradient_times_the_step():
    """To first order, a small step along the gradient lowers the loss by rate * norm squared."""
    state = new_state()
    state.optimizer = torch.optim.SGD(state.model.parameters(), lr=1.0)
    first, norm, _ = update(
        state, deal([random_batch(0)], CPU), CPU, learning_rate=1e-3, grad_clip=0, seed=0
    )
    second, _, _ = update(
        state, deal([random_batch(0)], CPU), CPU, learning_rate=0, grad_clip=0, seed=0
    )
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
    loss, norm, _ = update(
        state, deal([random_batch(0)], CPU), CPU, learning_rate=0.1, grad_clip=1.0, seed=0
    )
    assert not (math.isfinite(loss) and math.isfinite(norm))
    assert (state.step, state.skipped) == (1, 1)
    after = state.model.state_dict()
    assert all(torch.equal(before[key].nan_to_num(), after[key].nan_to_num()) for key in before)
    assert not state.optimizer.state  # its moments are clean, too
    undo()
    update(state, deal([random_batch(0)], CPU), CPU, learning_rate=0.1, grad_clip=1.0, seed=0)
    assert (state.step, state.skipped) == (2, 0)


def run_loop(state, max_iters, eval_interval=100, engine=CPU, batches=None, rate=0.01):
    """Run the loop; returns the losses and the steps at which it evaluated."""
    losses, evaluations = [], []
    train(
        state,
        engine,
        micro_batches=batches or (lambda step: [random_batch(step)]),
        learning_rate=lambda step: rate,
        max_iters=max_iters,
        eval_interval=eval_interval,
        grad_clip=1.0,
        seed=0,
        evaluate=lambda: evaluations.append(state.step),
        report=lambda step, **numbers: losses.append(numbers["loss"]),
    )
    return losses, evaluations


def test_three_updates_in_a_row_that_are_not_finite_end_the_run():
    state = new_state()
    poison(state, math.nan)
    with pytest.raises(ValueError, match=r"not finite, the last one in step 2 \(loss nan"):
        run_loop(state, 100)


def test_a_loss_scale_that_is_too_high_at_first_does_not_count():
    """GradScaler starts at 65536 and halves itself until fp16 gradients are finite."""
    state = new_state(dtype="float16")
    for p in state.model.parameters():
        p.register_hook(lambda g: (g * 2**12).half().float() / 2**12)  # overflows at first
    fp16 = Engine("cpu", "float16", compile=False)
    run_loop(state, 12, engine=fp16)
    assert state.skipped == 0
    assert state.scaler.get_scale() <= 65536 / 2**3  # it was skipped more often than is forgiven
    assert state.step == 12


# ------------------------------------------------------------------------------------------
# The loop


@pytest.mark.parametrize(
    ("max_iters", "interval", "steps"),
    [(6, 2, [0, 2, 4, 6]), (7, 3, [0, 3, 6, 7]), (2, 5, [0, 2]), (0, 5, [0])],
)
def test_the_loop_makes_exactly_max_iters_updates_and_evaluates_at_the_end(
    max_iters, interval, steps
):
    state = new_state()
    losses, evaluations = run_loop(state, max_iters, interval)
    assert len(losses) == state.step == max_iters
    assert evaluations == steps


def test_a_saved_state_continues_as_if_it_had_never_stopped():
    config = ModelConfig(vocab_size=11, block_size=7, n_layer=1, n_head=2, n_embd=6, dropout=0.2)
    whole, first, second = (new_state(config, seed) for seed in (0, 0, 1))
    expected, _ = run_loop(whole, 8)
    run_loop(first, 5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert run_loop(second, 8)[0] == expected[5:]
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
    losses, _ = run_loop(new_state(config), 100, batches=copy_batch)
    assert losses[0] > 2.2
    assert losses[-1] < 0.1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains_close_to_full_precision(dtype):
    expected, _ = run_loop(new_state(), 4)
    half, _ = run_loop(new_state(dtype=dtype), 4, engine=Engine("cpu", dtype, compile=False))
    assert half == pytest.approx(expected, abs=0.03)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_gpu_trains_as_the_cpu_does(dtype):
    expected, _ = run_loop(new_state(), 4)
    state = new_state()
    state.model.to("cuda")
    state.scaler = torch.amp.GradScaler("cuda", enabled=dtype == "float16")
    losses, _ = run_loop(state, 4, engine=Engine("cuda", dtype, compile=False))
    assert losses == pytest.approx(expected, abs=1e-3 if dtype == "float32" else 0.03)
