"""Laws of the causal task."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanolm.loss import NO_TARGET
from nanolm.tasks import causal
from nanolm.tasks.causal import CausalTask
from nanolm.text.data import Dataset
from nanolm.text.tokenizer import BPETokenizer, CharTokenizer

TASK = {"vocab_size": 50, "block_size": 5, "batch_size": 3, "seed": 1}


def dataset_of(n: int, tokenizer=None) -> Dataset:
    """Tokens 0, 1, 2 ... in both splits: each tells its place."""
    meta = {"val": {"bytes": 3 * n, "tokens": n}}
    return Dataset(Path("nowhere"), np.arange(n), np.arange(n), tokenizer, meta)


@given(st.integers(6, 50), st.integers(0, 30))
def test_the_targets_are_the_ids_one_place_further(n, index):
    batch = CausalTask(**TASK).batch(dataset_of(n), index)
    assert batch.keys() == {"ids", "targets"}
    assert batch["ids"].shape == (3, 5)
    assert np.array_equal(batch["ids"] + 1, batch["targets"])


@given(st.integers(6, 50), st.integers(0, 3))
def test_an_evaluation_is_the_same_each_time_and_as_large_on_either_text(n, eval_iters):
    """With eval_iters=0, all of the validation text, and as much of the other."""
    task, dataset = CausalTask(**TASK, eval_iters=eval_iters), dataset_of(n)
    counts = {}
    for split in ("train", "val"):
        pair = [list(task.evaluation(dataset, split)) for _ in range(2)]
        for one, other in zip(*pair, strict=True):
            assert all(np.array_equal(one[name], other[name]) for name in one)
        counts[split] = sum((batch["targets"] != NO_TARGET).sum() for batch in pair[0])
    assert counts["train"] == counts["val"] == min(n - 1, 15 * eval_iters or n)


def test_an_id_without_an_embedding_is_named_before_the_model_sees_it():
    task = CausalTask(**TASK)
    for batches in (lambda data: [task.batch(data, 0)], lambda d: list(task.evaluation(d, "val"))):
        with pytest.raises(ValueError, match="is outside the vocabulary of 50"):
            batches(dataset_of(200))


def test_the_loss_is_also_said_in_bits_per_byte():
    """ln 2 nats for a token of three bytes are a third of a bit for each."""
    score = CausalTask(**TASK).score(torch.tensor([8 * np.log(2), 8]), dataset_of(9))
    wanted = {"loss": np.log(2), "perplexity": 2, "bits_per_byte": 1 / 3}
    assert score == pytest.approx(wanted)


BPE = BPETokenizer.train(["aa"], 258)


@pytest.mark.parametrize(
    ("tokenizer", "text", "opening"),
    [
        (BPE, None, 257),
        (BPE, [97, 257, 10, 97], 257),
        (BPE, [97, 10, 97], 10),
        (BPE, [97, 98], 97),
        (CharTokenizer("a\nb"), None, 0),
        (CharTokenizer("a\tb\n"), [2, 1, 2], 1),
        (CharTokenizer("ab"), None, 0),
        (CharTokenizer("ab"), [1, 0], 1),
    ],
)
def test_a_text_begins_after_the_end_of_another_one(tokenizer, text, opening):
    """Or of a line; or after whatever the training text has, and the model has learned."""
    assert causal.opening(tokenizer, None if text is None else np.array(text)) == opening


def test_a_token_is_looked_for_in_the_whole_of_a_long_text():
    text = np.zeros(2_000_003, np.uint8)
    assert not causal.shows(text, 1)
    text[-1] = 1
    assert causal.shows(text, 1)
