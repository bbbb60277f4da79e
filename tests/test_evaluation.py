"""Laws of evaluation."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanolm.batches import evaluation_batches
from nanolm.evaluation import accuracy_counts, bits_per_byte, evaluate, mean_loss, perplexity
from nanolm.layers import ModelConfig
from nanolm.model import GPT

CONFIG = ModelConfig(vocab_size=11, block_size=7, n_layer=1, n_head=1, n_embd=6, dropout=0.5)


def batches(tokens, batch_size, block_size=7):
    for batch in evaluation_batches(tokens, batch_size=batch_size, block_size=block_size):
        yield {name: torch.from_numpy(array) for name, array in batch.items()}


def loss(model, batches) -> float:
    return mean_loss(evaluate(model, batches))


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 60), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_the_loss_is_the_mean_over_tokens_however_they_are_batched(n, one, other, seed):
    torch.manual_seed(seed)
    model = GPT(CONFIG)
    tokens = np.random.default_rng(seed).integers(11, size=n)
    first = loss(model, batches(tokens, one))
    second = loss(model, batches(tokens, other))
    model.eval()
    surprise = [
        -torch.log_softmax(model(ids[row : row + 1])[0], -1)[0, i, targets[row, i]].item()
        for ids, targets in (batch.values() for batch in batches(tokens, 1))
        for row in range(len(ids))
        for i in range(7)
        if targets[row, i] >= 0
    ]
    assert len(surprise) == n - 1
    assert first == pytest.approx(second, abs=1e-6)
    assert first == pytest.approx(np.mean(surprise), abs=1e-5)


def test_the_loss_is_the_same_where_hits_are_counted_too():
    model, tokens = GPT(CONFIG), np.arange(30) % 11
    counts = evaluate(model, batches(tokens, 3), tally=accuracy_counts)
    assert len(counts) == 3
    assert mean_loss(counts) == pytest.approx(loss(model, batches(tokens, 3)))


def test_evaluation_leaves_mode_and_random_numbers_alone():
    model = GPT(CONFIG).train()
    tokens = np.arange(30) % 11
    before = torch.get_rng_state()
    losses = {loss(model, batches(tokens, 3)) for _ in range(2)}
    assert len(losses) == 1  # no dropout
    assert model.training
    assert all(module.training for module in model.modules())
    assert torch.equal(before, torch.get_rng_state())
    assert not loss(model.eval(), batches(tokens, 3)) - losses.pop()
    assert not model.training


def test_nothing_to_evaluate_is_an_error():
    empty = [{"ids": torch.zeros(2, 3, dtype=torch.long), "targets": torch.full((2, 3), -1)}]
    for nothing in (empty, []):
        with pytest.raises(ValueError, match="nothing to evaluate"):
            loss(GPT(CONFIG), nothing)


@given(st.integers(1, 10**6))
def test_a_blind_guess_has_the_perplexity_of_its_vocabulary(size):
    assert perplexity(math.log(size)) == pytest.approx(size)


def test_a_hopeless_loss_has_an_infinite_perplexity():
    assert perplexity(1e4) == math.inf


@given(st.floats(0.01, 20), st.floats(0.5, 10))
def test_bits_per_byte_do_not_depend_on_how_text_is_cut_into_tokens(loss, bytes_per_token):
    bits = bits_per_byte(loss, bytes_per_token)
    assert bits * math.log(2) * bytes_per_token == pytest.approx(loss)
    assert bits_per_byte(2 * loss, 2 * bytes_per_token) == pytest.approx(bits)
    assert bits_per_byte(math.log(256), 1) == pytest.approx(8)
