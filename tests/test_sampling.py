"""Laws of sampling."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanolm.layers import ModelConfig
from nanolm.model import GPT
from nanolm.sampling import generate, keep_top_k, keep_top_p, sample_next, until

VOCAB = 13
# No two logits so close that rounding decides which is larger.
logit_rows = st.lists(
    st.integers(-500, 500).map(lambda n: n / 100), min_size=VOCAB, max_size=VOCAB, unique=True
)


def tiny_model(seed: int = 0, **keys) -> GPT:
    """A model with weights far from zero, so that its guesses are far from even."""
    keys = {"position": "learned", "block_size": 8, **keys}
    config = ModelConfig(vocab_size=VOCAB, n_layer=2, n_head=2, n_embd=20, **keys)
    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def run(model, prompt, n, **options) -> torch.Tensor:
    """All tokens of a generation, (B, n)."""
    return torch.stack(list(generate(model, prompt, max_new_tokens=n, **options)), dim=1)


def kept(logits: torch.Tensor) -> set[int]:
    return set(torch.isfinite(logits).nonzero().flatten().tolist())


@given(logit_rows, st.integers(1, VOCAB + 3))
def test_top_k_keeps_the_k_largest(row, k):
    assert kept(keep_top_k(torch.tensor(row, dtype=torch.float64), k)) == reference.top_k(
        np.array(row), k
    )


@given(logit_rows)
def test_top_k_of_none_or_zero_keeps_all(row):
    logits = torch.tensor(row)
    assert torch.equal(keep_top_k(logits, None), logits)
    assert torch.equal(keep_top_k(logits, 0), logits)


@given(logit_rows, st.floats(0.001, 0.999))
def test_top_p_keeps_the_smallest_set_that_is_enough(row, p):
    logits = torch.tensor(row, dtype=torch.float64)
    found = kept(keep_top_p(logits, p))
    assert found == reference.top_p(np.array(row), p)
    probabilities = torch.softmax(logits, dim=-1)
    assert len(found) >= 1
    assert sum(probabilities[i] for i in found) >= p - 1e-12
    least = min(found, key=lambda i: probabilities[i])
    assert len(found) == 1 or sum(probabilities[i] for i in found - {least}) < p + 1e-12


@given(logit_rows)
def test_top_p_of_none_or_one_keeps_all(row):
    logits = torch.tensor(row)
    assert torch.equal(keep_top_p(logits, None), logits)
    assert torch.equal(keep_top_p(logits, 1.0), logits)


@given(logit_rows, st.integers(0, 100))
def test_temperature_zero_takes_the_largest(row, seed):
    logits = torch.tensor([row])
    assert sample_next(logits, temperature=0).item() == int(np.argmax(row))
    cold = sample_next(logits, top_k=1, generator=torch.Generator().manual_seed(seed))
    assert cold.item() == int(np.argmax(row))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_the_softmax_says(temperature):
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]])
    n, generator = 20_000, torch.Generator().manual_seed(0)
    drawn = sample_next(logits.expand(n, -1), temperature=temperature, generator=generator)
    expected = reference.softmax(logits[0].double().numpy() / temperature)
    assert np.abs(np.bincount(drawn, minlength=4) / n - expected).max() < 0.015


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 5), st.integers(1, 12), st.sampled_from(["learned", "rotary", "sinusoidal"]))
def test_with_and_without_a_cache_the_same_text_is_written(seed, length, position):
    """Also past the context: both keep the last half of it."""
    model = tiny_model(seed, position=position)
    prompt = torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(seed))
    cached, uncached = (
        run(model, prompt, 19, use_cache=use, generator=torch.Generator().manual_seed(seed))
        for use in (True, False)
    )
    assert torch.equal(cached, uncached)


def test_past_the_context_the_last_half_is_kept():
    """Greedy decoding by hand, without a cache, following the stated rule."""
    model = tiny_model(3)
    context = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]])[:, -8:]
    expected = []
    for _ in range(20):
        if context.shape[1] > 8:
            context = context[:, -4:]
        expected.append(model(context)[0][0, -1].argmax().item())
        context = torch.cat((context, torch.tensor([[expected[-1]]])), dim=1)
    prompt = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]])
    assert run(model, prompt, 20, temperature=0)[0].tolist() == expected


def test_a_context_of_one_token_works():
    model = tiny_model(block_size=1)
    assert run(model, torch.tensor([[1, 2]]), 5).shape == (1, 5)


def test_the_samples_of_a_batch_differ():
    model = tiny_model()
    tokens = run(model, torch.zeros(50, 1, dtype=torch.long), 1, temperature=2.0)
    assert len(set(tokens[:, 0].tolist())) > 3


def test_a_seed_repeats_a_sample():
    model, prompt = tiny_model(), torch.zeros(3, 2, dtype=torch.long)
    first, second, other = (
        run(model, prompt, 10, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_a_row_repeats_its_stop_token_and_the_stream_ends_when_all_rows_have_stopped():
    model, prompt = tiny_model(), torch.zeros(6, 1, dtype=torch.long)
    stops = {1, 2, 3, 4}
    tokens = run(
        model, prompt, 500, stop_ids=stops, generator=torch.Generator().manual_seed(0)
    ).tolist()
    firsts = [next(i for i, token in enumerate(row) if token in stops) for row in tokens]
    assert len(tokens[0]) == max(firsts) + 1 < 500
    for row, first in zip(tokens, firsts, strict=True):
        assert set(row[first:]) == {row[first]}


def test_no_gradient_is_kept():
    assert not next(generate(tiny_model(), torch.tensor([[1]]), max_new_tokens=1)).requires_grad


@pytest.mark.parametrize(
    ("knob", "value"),
    [("temperature", -1.0), ("temperature", math.nan), ("top_k", -1), ("top_p", 0.0)]
    + [("top_p", 1.5), ("max_new_tokens", -1)],
)
def test_a_knob_out_of_range_is_refused_by_name(knob, value):
    options = {"max_new_tokens": 1, knob: value}
    with pytest.raises(ValueError, match=knob):
        next(generate(tiny_model(), torch.tensor([[1]]), **options))


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt is empty"):
        next(generate(tiny_model(), torch.zeros(1, 0, dtype=torch.long), max_new_tokens=1))


@given(st.lists(st.text("ab", max_size=4)), st.text("ab", min_size=1, max_size=4))
def test_a_text_ends_before_its_stop_text_wherever_the_pieces_are_cut(pieces, stop):
    text = "".join(pieces)
    assert "".join(until(pieces, stop)) == text.split(stop)[0]
    assert "".join(until(pieces, None)) == text


def test_text_is_passed_on_as_soon_as_it_cannot_become_the_stop_text():
    stream = until(iter(["ab", "c", "<", "x", "<", "/"]), "</")
    assert [next(stream) for _ in range(4)] == ["ab", "c", "", "<x"]
