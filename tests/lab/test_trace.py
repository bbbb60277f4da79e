"""Laws of looking inside: what is shown is what the model does anyway."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import (
    encoder_configs,
    model_configs,
    pair_configs,
    random_model,
    random_tokens,
    seeds,
)

from nanolm.attention import MultiHeadAttention, for_each_query
from nanolm.lab.trace import guesses_of_hidden, lens, shares, surprise, trace
from nanolm.layers import ModelConfig

configs = st.one_of(model_configs(), encoder_configs(), pair_configs())


def inputs_of(config: ModelConfig, seed: int, T: int) -> dict[str, torch.Tensor]:
    """One text; of an encoder-decoder, two; of labelled words, some places."""
    inputs = {"ids": random_tokens(config, seed, batch=1, length=T)}
    if config.n_encoder_layer:
        inputs["source"] = random_tokens(config, seed + 1, batch=1, length=T + 2)
    if config.head == "words":
        inputs["places"] = torch.tensor([[0, T - 1]])
    return inputs


@given(configs, seeds, st.integers(2, 9))
def test_a_trace_is_of_the_plain_forward_pass(config, seed, T):
    """To the bit; and afterwards the model is as it was."""
    model, inputs = random_model(config, seed), inputs_of(config, seed, T)
    before = {name: vars(layer).keys() for name, layer in model.named_modules()}
    with torch.no_grad():
        plain, _ = model(**inputs)
        found = trace(model, inputs)
        assert torch.equal(found.logits, plain[0])
        assert torch.equal(model(**inputs)[0], plain)
    assert {name: vars(layer).keys() for name, layer in model.named_modules()} == before
    assert not any(layer._forward_hooks for layer in model.modules())


@given(configs, seeds, st.integers(2, 9))
def test_the_weights_are_those_by_which_values_are_mixed(config, seed, T):
    """Rows add up to 1, no causal one looks ahead, and they make what the layer gives."""
    model, inputs = random_model(config, seed), inputs_of(config, seed, T)
    calls = []
    for name, layer in model.named_modules():
        if isinstance(layer, MultiHeadAttention):
            layer.register_forward_hook(
                lambda layer, args, options, y, name=name: calls.append(
                    (name, layer, args[0], options.get("memory"), y)
                ),
                with_kwargs=True,
            )
    found, turn = trace(model, inputs), {"text": 0, "source": 0, "cross": 0}
    assert {kind: len(each) for kind, each in found.attention.items()} == {
        kind: n
        for kind, n in (
            ("text", config.n_layer),
            ("source", config.n_encoder_layer),
            ("cross", config.n_layer * (config.n_encoder_layer > 0)),
        )
        if n
    }
    for name, layer, x, memory, y in calls:
        kind = "cross" if memory is not None else "source" if "encoder" in name else "text"
        weights = found.attention[kind][turn[kind]]
        turn[kind] += 1
        assert torch.allclose(weights.sum(dim=-1), torch.ones((), dtype=weights.dtype))
        if kind == "text" and config.causal:
            assert not weights.triu(1).any()
        seen = x if memory is None else memory
        v = layer.v(seen).view(1, seen.shape[1], -1, layer.head_size).transpose(1, 2)
        mixed = (weights @ for_each_query(v, config.n_head)[0]).transpose(0, 1).flatten(1)
        torch.testing.assert_close(layer.out(mixed), y[0])


@given(configs, seeds, st.integers(2, 9))
def test_the_lens_ends_with_the_models_own_answer(config, seed, T):
    model, inputs = random_model(config, seed), inputs_of(config, seed, T)
    found = trace(model, inputs)
    *before, last = lens(model, found.streams["text"], inputs)
    assert len(before) == config.n_layer
    torch.testing.assert_close(last, found.logits, atol=1e-6, rtol=0)
    assert {whose: len(each) - 1 for whose, each in found.streams.items()} == {
        "text": config.n_layer,
        **({"source": config.n_encoder_layer} if config.n_encoder_layer else {}),
    }


@settings(max_examples=15)
@given(encoder_configs(head="tokens"), seeds)
def test_each_token_is_guessed_as_if_it_were_not_there(config, seed):
    model, ids = random_model(config, seed), random_tokens(config, seed, batch=1)[0]
    found = guesses_of_hidden(model, ids, mask=0)
    other = random_tokens(config, seed + 1, batch=1)[0]
    for i in range(len(ids)):
        hidden = ids.clone()
        hidden[i] = 0
        torch.testing.assert_close(found[i], model(hidden[None])[0][0, i])
        changed = torch.where(torch.arange(len(ids)) == i, other, ids)
        torch.testing.assert_close(found[i], guesses_of_hidden(model, changed, mask=0)[i])


@given(seeds, st.integers(1, 5))
def test_surprise_is_minus_log_p(seed, T):
    random = np.random.default_rng(seed)
    logits, ids = random.normal(size=(T, 7)), random.integers(7, size=T)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    found = surprise(torch.from_numpy(logits), torch.from_numpy(ids))
    np.testing.assert_allclose(found, -np.log(p[np.arange(T), ids]), atol=1e-5)


@settings(max_examples=20)
@given(st.sampled_from(["text", "words"]), seeds)
def test_shares_are_what_a_small_change_of_each_vector_does(head, seed):
    """In float64: log p of the best label, with one token's vector a little longer and shorter."""
    config = ModelConfig(
        vocab_size=17, block_size=11, n_layer=2, n_head=2, n_embd=6, causal=False, head=head,
        labels=("a", "b", "c"),
    )  # fmt: skip
    model, inputs = random_model(config, seed), inputs_of(config, seed, 5)
    found, step = shares(model, inputs), 1e-5
    best = model(**inputs)[0][0].argmax(dim=-1)
    for t in range(5):
        sides = []
        for sign in (1, -1):
            factors = torch.ones(5, 1).double()
            factors[t] += sign * step
            hook = model.tokens.register_forward_hook(lambda *call, by=factors: call[-1] * by)
            log_p = model(**inputs)[0][0].log_softmax(dim=-1)
            hook.remove()
            sides.append(log_p.gather(1, best[:, None])[:, 0])
        expected = (sides[0] - sides[1]) / (2 * step)
        torch.testing.assert_close(found[:, t].double(), expected.detach(), atol=1e-5, rtol=1e-3)
