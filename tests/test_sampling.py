"""Laws of sampling."""

import math
from itertools import product

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_close
from strategies import seeds
from torch.nn import functional as F

from nanolm.layers import POSITIONS, ModelConfig
from nanolm.model import GPT
from nanolm.sampling import beam_search, generate, keep_top_k, keep_top_p, sample_next, until

VOCAB = 13
# No two logits so close that rounding decides which is larger.
logit_rows = st.lists(
    st.integers(-500, 500).map(lambda n: n / 100), min_size=VOCAB, max_size=VOCAB, unique=True
)


def tiny_model(seed: int = 0, **keys) -> GPT:
    """A model with weights far from zero, so that its guesses are far from even."""
    keys = {"position": "learned", "block_size": 8, "vocab_size": VOCAB, **keys}
    config = ModelConfig(n_layer=2, n_head=2, n_embd=20, **keys)
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


def test_all_that_are_equal_to_the_kth_largest_stay():
    assert kept(keep_top_k(torch.tensor([1.0, 2.0, 0.0, 1.0]), 2)) == {0, 1, 3}


@given(st.lists(logit_rows, min_size=2, max_size=3))
def test_each_row_keeps_its_own_top_k(rows):
    found = keep_top_k(torch.tensor(rows, dtype=torch.float64), 3)
    assert [kept(row) for row in found] == [reference.top_k(np.array(row), 3) for row in rows]


@given(st.lists(logit_rows, min_size=2, max_size=3))
def test_each_row_keeps_its_own_top_p(rows):
    found = keep_top_p(torch.tensor(rows, dtype=torch.float64), 0.5)
    assert [kept(row) for row in found] == [reference.top_p(np.array(row), 0.5) for row in rows]


@given(logit_rows)
def test_without_a_k_all_tokens_are_kept(row):
    logits = torch.tensor(row)
    assert torch.equal(keep_top_k(logits, None), logits)
    assert torch.equal(keep_top_k(logits, 0), logits)


@given(logit_rows)
def test_without_a_p_all_tokens_are_kept(row):
    logits = torch.tensor(row)
    assert torch.equal(keep_top_p(logits, None), logits)
    assert torch.equal(keep_top_p(logits, 1.0), logits)


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


@given(st.sampled_from([2, 4, 8]), st.data())
def test_top_p_keeps_no_more_than_reach_it_exactly(vocabulary, data):
    """Of equal tokens, each as likely as 1/4, two reach 1/2; the third is one too many."""
    n = data.draw(st.integers(1, vocabulary - 1))
    assert kept(keep_top_p(torch.zeros(vocabulary), n / vocabulary)) == set(range(n))


@pytest.mark.parametrize("p", [1e-30, 1e-50, 5e-324])
def test_top_p_always_keeps_the_most_likely_token(p):
    """1e-50 is 0 in float32, and no token was left."""
    assert kept(keep_top_p(torch.tensor([0.0, 2.0, 1.0]), p)) == {1}


@given(logit_rows, st.sampled_from([0, 5e-324, 1e-50, 1e-45, 1e-40, 1.2e-38, 1e-30]))
def test_a_temperature_of_almost_zero_takes_the_largest(row, temperature):
    """Divided by it, logits are infinite, and those of 0 are no numbers: none could be drawn."""
    logits = torch.tensor([row])
    assert sample_next(logits, temperature=temperature).item() == int(np.argmax(row))
    assert sample_next(logits, top_k=1).item() == int(np.argmax(row))


@pytest.mark.parametrize(
    ("temperature", "k", "p"),
    [
        *((temperature, None, None) for temperature in (0.5, 1.0, 2.0)),
        (2.0, None, 0.6),  # two tokens reach it; at temperature 1 it would be one
        (1.0, 2, 0.7),  # one of the two reaches it; of all, it would be two
    ],
)
def test_tokens_are_drawn_as_often_as_the_formula_says(temperature, k, p):
    """Temperature first, then top-k, then top-p."""
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    options = {"temperature": temperature, "top_k": k, "top_p": p}
    n, generator = 20_000, torch.Generator().manual_seed(0)
    drawn = sample_next(logits.expand(n, -1), **options, generator=generator)
    found = np.bincount(drawn, minlength=4) / n
    assert_close(found, reference.next_token(logits, temperature, k, p), 0.015)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 5), st.integers(1, 12), st.sampled_from(POSITIONS))
def test_with_and_without_a_cache_the_same_text_is_written(seed, length, position):
    """Also past the context: both keep the last half of it."""
    model = tiny_model(seed, position=position)
    prompt = torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(seed))
    cached, uncached = (
        run(model, prompt, 19, use_cache=use, generator=torch.Generator().manual_seed(seed))
        for use in (True, False)
    )
    assert torch.equal(cached, uncached)


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.integers(1, 6), min_size=2, max_size=4),
    st.sampled_from(POSITIONS),
    st.booleans(),
    seeds,
)
def test_prompts_of_different_lengths_are_continued_as_each_alone(
    lengths, position, use_cache, seed
):
    """Filled up at the left; and some rows stop before the others do."""
    model, T = tiny_model(seed, position=position, block_size=16), max(lengths)
    random = np.random.default_rng(seed)
    prompts = [torch.from_numpy(random.integers(VOCAB, size=n)) for n in lengths]
    ids, segments = (
        torch.stack([F.pad(row, (T - len(row), 0)) for row in rows])
        for rows in (prompts, [torch.ones_like(prompt) for prompt in prompts])
    )
    options = {"temperature": 0, "stop_ids": [3, 5], "use_cache": use_cache}
    together = run(model, ids, 10, segments=segments, **options)
    for row, prompt in zip(together.tolist(), prompts, strict=True):
        alone = run(model, prompt[None], 10, **options)[0].tolist()
        assert row == alone + alone[-1:] * (len(row) - len(alone))


def test_rows_that_have_stopped_are_no_longer_computed():
    model, sizes, stops = tiny_model(), [], {1, 2, 3, 4}
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    options = {"stop_ids": stops, "generator": torch.Generator().manual_seed(0)}
    tokens = run(model, torch.zeros(6, 1, dtype=torch.long), 500, **options).tolist()
    firsts = [next(i for i, token in enumerate(row) if token in stops) for row in tokens]
    assert sizes == [sum(first >= step for first in firsts) for step in range(len(tokens[0]))]


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


# ------------------------------------------------------------------------------------------
# Beams


@given(st.integers(0, 10**6), st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5))
@settings(max_examples=20)
def test_one_beam_goes_the_way_of_the_likeliest_tokens(seed, prompt):
    model, prompt, stop = tiny_model(seed, block_size=16), torch.tensor([prompt]), [1, 2]
    options = {"max_new_tokens": 6, "stop_ids": stop}
    found = beam_search(model, prompt, num_beams=1, **options).tolist()
    (greedy,) = run(model, prompt, 6, temperature=0.0).tolist()
    ends = [i for i, token in enumerate(greedy) if token in stop]
    assert found == greedy[: ends[0] + 1 if ends else None]
    assert not len(beam_search(model, prompt, num_beams=3, max_new_tokens=0))


def log_probability(model: GPT, prompt: list[int], text: tuple[int, ...]) -> float:
    """Of a text after a prompt, without a cache."""
    logits = model(torch.tensor([[*prompt, *text]]))[0][0].log_softmax(dim=-1)
    return sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(text))


@given(st.integers(0, 10**6), st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]))
@settings(max_examples=10)
@torch.no_grad()
def test_enough_beams_find_the_best_of_all_texts(seed, length_penalty):
    """Looked for one by one: each text that a stop token ends, or the limit."""
    model, prompt, stop, limit = tiny_model(seed, vocab_size=5).double(), [3], 2, 4
    tokens, texts = set(range(5)) - {stop}, []
    for length in range(1, limit + 1):
        texts += [(*text, stop) for text in product(tokens, repeat=length - 1)]
    texts += product(tokens, repeat=limit)

    def score(text: tuple[int, ...]) -> float:
        return log_probability(model, prompt, text) / len(text) ** length_penalty

    options = {"num_beams": len(texts), "max_new_tokens": limit, "length_penalty": length_penalty}
    found = beam_search(model, torch.tensor([prompt]), stop_ids=[stop], **options)
    assert score(tuple(found.tolist())) == pytest.approx(max(map(score, texts)), rel=1e-5)


def test_no_gradient_is_kept():
    assert not next(generate(tiny_model(), torch.tensor([[1]]), max_new_tokens=1)).requires_grad


@pytest.mark.parametrize(
    ("option", "value"),
    [("temperature", -1.0), ("temperature", math.nan), ("top_k", -1), ("top_p", 0.0)]
    + [("top_p", 1.5), ("max_new_tokens", -1)],
)
def test_an_option_out_of_range_is_refused_by_name(option, value):
    options = {"max_new_tokens": 1, option: value}
    with pytest.raises(ValueError, match=option):
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
