"""Laws of the masked task."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import random_model, seeds

from nanolm.evaluation import evaluate
from nanolm.layers import ModelConfig
from nanolm.loss import NO_TARGET
from nanolm.tasks.causal import CausalTask
from nanolm.tasks.masked import MaskedTask
from nanolm.text.data import Dataset
from nanolm.text.tokenizer import BPETokenizer, CharTokenizer, extends, mask_of

BARE = BPETokenizer.train(["the wolves met the foxes, and the foxes ran"] * 3, 270)
MODEL = ModelConfig(vocab_size=271, block_size=16, n_layer=1, n_head=1, n_embd=4, causal=False)


def dataset_of(n: int) -> Dataset:
    """Tokens 0, 1, 2 ... in both splits, of a vocabulary of 270 and a mask."""
    ids = np.arange(n) % 270
    meta = {"val": {"bytes": 3 * n, "tokens": n}}
    return MaskedTask.fit(Dataset(Path("nowhere"), ids, ids, BARE, meta))[0]


def task_of(**keys) -> MaskedTask:
    return MaskedTask(**{"vocab_size": 271, "block_size": 16, "batch_size": 3, "seed": 1} | keys)


fractions = st.sampled_from([0.01, 0.15, 0.5, 0.9])


@given(fractions, st.integers(0, 30), seeds)
def test_a_share_of_each_window_is_hidden_and_the_rest_is_the_text(fraction, index, seed):
    """The targets are what stood at their places, each place once, and no other id has changed."""
    task, dataset = task_of(mask_fraction=fraction, seed=seed), dataset_of(900)
    batch = task.batch(dataset, index)
    text = CausalTask(vocab_size=271, block_size=16, batch_size=3, seed=seed).batch(dataset, index)
    n = max(1, round(fraction * 16))
    assert batch["places"].shape == batch["targets"].shape == (3, n)
    assert all(len(set(row)) == n for row in batch["places"].tolist())
    restored = batch["ids"].copy()
    np.put_along_axis(restored, batch["places"], batch["targets"], axis=1)
    assert np.array_equal(restored, text["ids"])


def test_most_of_what_is_hidden_is_masked_some_is_exchanged_and_some_left():
    """In shares of 80, 10 and 10 % (Devlin et al. 2019), over thousands of tokens."""
    task, dataset = task_of(mask_fraction=0.5, batch_size=500), dataset_of(20_000)
    batch = task.batch(dataset, 0)
    seen = np.take_along_axis(batch["ids"], batch["places"], axis=1)
    masked, left = seen == mask_of(dataset.tokenizer), seen == batch["targets"]
    for share, wanted in ((masked, 0.8), (left, 0.1), (~masked & ~left, 0.1)):
        assert share.mean() == pytest.approx(wanted, abs=0.025)
    assert len(set(seen[~masked & ~left])) > 100  # of all tokens


@given(st.integers(0, 30), seeds)
def test_what_is_hidden_depends_on_the_seed_and_the_number_of_the_batch_alone(index, seed):
    dataset = dataset_of(900)
    one, again = (task_of(seed=seed).batch(dataset, index) for _ in range(2))
    assert all(np.array_equal(one[name], again[name]) for name in one)
    other = task_of(seed=seed).batch(dataset, index + 1)
    assert not np.array_equal(one["places"], other["places"])


@given(st.integers(2, 70), st.integers(0, 3), fractions)
def test_an_evaluation_hides_the_same_tokens_each_time_and_no_padding(n, eval_iters, fraction):
    task, dataset = task_of(eval_iters=eval_iters, mask_fraction=fraction), dataset_of(n)
    pair = [list(task.evaluation(dataset, "val")) for _ in range(2)]
    for one, other in zip(*pair, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)
    for batch in pair[0]:
        real = batch.get("mask", np.ones_like(batch["ids"], bool))
        chosen = batch["targets"] != NO_TARGET
        assert np.take_along_axis(real, batch["places"], axis=1)[chosen].all()
        wanted = np.maximum(1, np.rint(fraction * real.sum(axis=1)))
        assert np.array_equal(chosen.sum(axis=1), wanted)


@given(seeds)
def test_the_scores_are_those_of_all_hidden_tokens_at_once(seed):
    """Loss, accuracy, and e to the loss, summed over batches of different sizes."""
    task, dataset, model = task_of(), dataset_of(90), random_model(MODEL, seed).float()
    batches = [
        {name: torch.from_numpy(array) for name, array in batch.items()}
        for batch in task.evaluation(dataset, "val")
    ]
    scores = task.score(evaluate(model, batches, tally=task.tally), dataset)
    surprises, hits = [], []
    for batch in batches:
        targets = batch.pop("targets")
        log_p = model(**batch)[0].log_softmax(dim=-1)
        for row, column in (targets != NO_TARGET).nonzero().tolist():
            surprises.append(-log_p[row, column, targets[row, column]].item())
            hits.append(log_p[row, column].argmax() == targets[row, column])
    assert scores["loss"] == pytest.approx(np.mean(surprises), rel=1e-4)
    assert scores["accuracy"] == pytest.approx(np.mean(hits))
    assert scores["pseudo_perplexity"] == pytest.approx(np.exp(np.mean(surprises)), rel=1e-3)


@given(seeds)
def test_an_answer_names_the_likeliest_tokens_for_each_mask(seed):
    """With the probabilities that the model gives them."""
    tokenizer, model = dataset_of(9).tokenizer, random_model(MODEL, seed).float()
    [pieces] = MaskedTask.answer(model, tokenizer, "the <|mask|> met<|mask|>")
    lines = "".join(pieces).split("\n")
    ids = tokenizer.encode("the <|mask|> met<|mask|>", allowed_special="all")
    p = model(torch.tensor([ids]))[0][0].softmax(dim=-1)
    places = [i for i, token in enumerate(ids) if token == mask_of(tokenizer)]
    assert len(lines) == len(places) == 2
    for line, place in zip(lines, places, strict=True):
        best = p[place].argmax().item()
        assert line.startswith(f"{tokenizer.decode([best])!r} {p[place, best]:.1%}  ")


def test_a_text_without_a_mask_is_told_how_to_write_one():
    with pytest.raises(ValueError, match=r"start='the': write <\|mask\|> where the model"):
        MaskedTask.answer(random_model(MODEL, 0), dataset_of(9).tokenizer, "the")


def test_the_mask_is_the_last_token_and_all_others_keep_their_ids():
    tokenizer = dataset_of(9).tokenizer
    assert mask_of(tokenizer) == BARE.vocab_size == tokenizer.vocab_size - 1
    assert tokenizer.encode("the foxes") == BARE.encode("the foxes")
    assert tokenizer.encode("<|mask|>", allowed_special="all") == [270]
    assert mask_of(BARE) is None


def test_a_tokenizer_extends_another_by_special_tokens_alone():
    masked, chars = dataset_of(9).tokenizer, CharTokenizer("abc")
    assert extends(BARE, BARE)
    assert extends(masked, BARE)
    assert not extends(BARE, masked)
    other = BPETokenizer.train(["something else, something more"] * 3, 270)
    for one in (BARE, masked, chars):
        assert not extends(other, one)
        assert not extends(one, other)
    assert not extends(masked, chars)


def test_characters_have_no_mask():
    dataset = replace(dataset_of(9), tokenizer=CharTokenizer("abc"))
    with pytest.raises(ValueError, match=r"no token for <\|mask\|>: prepare the text with"):
        MaskedTask.fit(dataset)
