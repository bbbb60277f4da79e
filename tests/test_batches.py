"""Laws of the batches."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nanolm.batches import (
    POOL,
    check_ids,
    epoch_groups,
    epoch_starts,
    evaluation_batches,
    training_batch,
    windows_per_epoch,
)
from nanolm.loss import NO_TARGET

lengths = st.integers(2, 400)
block_sizes = st.integers(1, 50)
seeds = st.integers(0, 2**32)


@given(lengths, block_sizes, seeds, st.integers(0, 20))
def test_the_windows_of_an_epoch_never_overlap_and_stay_inside_the_text(
    n, block_size, seed, epoch
):
    assume(n > block_size)
    starts = np.sort(epoch_starts(n, block_size, seed, epoch))
    assert len(starts) == max(1, (n - 1) // block_size - 1)
    assert np.all(np.diff(starts) == block_size)  # each window once, side by side
    assert starts[0] >= 0
    assert starts[-1] + block_size + 1 <= n  # with the target of its last token


def test_every_offset_occurs_including_the_one_that_ends_the_text():
    """randint(len - block_size) would leave out the last window."""
    n, block_size = 11, 3
    offsets = {epoch_starts(n, block_size, 0, epoch).min() for epoch in range(200)}
    assert offsets == set(range(n - 2 * block_size))


@given(lengths, block_sizes)
def test_an_epoch_takes_one_window_fewer_than_fit_and_at_least_one(n, block_size):
    assume(n > block_size)
    fit = len(range(0, n - block_size, block_size))
    assert windows_per_epoch(n, block_size) == max(1, fit - 1)


def test_a_text_of_one_window_is_enough():
    assert windows_per_epoch(6, 5) == 1
    with pytest.raises(ValueError, match=r"block_size=6.* needs 7 tokens and there are 6"):
        windows_per_epoch(6, 6)


@given(lengths, block_sizes, seeds, st.integers(1, 7), st.integers(0, 50))
def test_a_batch_is_windows_of_the_text_and_their_next_tokens(n, block_size, seed, batch, index):
    assume(n > block_size)
    tokens = np.arange(n, dtype=np.uint16)  # as in a file; each token tells its place
    shape = {"batch_size": batch, "block_size": block_size, "seed": seed}
    ids, targets = training_batch(tokens, index, **shape).values()
    assert ids.shape == targets.shape == (batch, block_size)
    assert ids.dtype == targets.dtype == np.int64
    assert np.all(np.diff(ids, axis=1) == 1)
    assert np.all(targets == ids + 1)


@given(lengths, block_sizes, seeds, st.integers(1, 7))
def test_an_epoch_of_batches_shows_each_window_once(n, block_size, seed, batch):
    assume(n > block_size)
    windows = windows_per_epoch(n, block_size)
    shape = {"batch_size": batch, "block_size": block_size, "seed": seed}
    firsts = [
        start
        for index in range(-(-2 * windows // batch))
        for start in training_batch(np.arange(n), index, **shape)["ids"][:, 0]
    ]
    for epoch in range(2):  # a batch may span both
        seen = firsts[epoch * windows : (epoch + 1) * windows]
        assert sorted(seen) == sorted(epoch_starts(n, block_size, seed, epoch))


@given(seeds, st.permutations(range(6)))
def test_a_batch_depends_on_its_number_alone_and_not_on_what_was_asked_before(seed, order):
    shape = {"batch_size": 3, "block_size": 5, "seed": seed}
    tokens = np.arange(67)
    batches = {}
    for index in order:
        batches[index] = training_batch(tokens, index, **shape)
    epoch_starts.cache_clear()
    for index in range(6):
        again = training_batch(tokens, index, **shape)
        assert again.keys() == batches[index].keys() == {"ids", "targets"}
        assert all(np.array_equal(again[name], batches[index][name]) for name in again)


def test_seeds_and_epochs_order_the_windows_differently():
    orders = {tuple(epoch_starts(1000, 5, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@given(lengths, block_sizes, st.integers(1, 7))
def test_a_whole_evaluation_predicts_every_token_but_the_first_once(n, block_size, batch):
    tokens = np.arange(n)
    seen = []
    for part in evaluation_batches(tokens, batch_size=batch, block_size=block_size):
        ids, targets = part["ids"], part["targets"]
        assert ids.shape == targets.shape == (batch, block_size)
        real = targets != NO_TARGET
        assert np.all(targets[real] == ids[real] + 1)
        seen.extend(targets[real])
    assert seen == list(range(1, n))


@given(lengths, block_sizes, st.integers(1, 7), st.integers(1, 9))
def test_a_part_of_an_evaluation_is_as_large_as_asked_and_spread_out(n, block_size, batch, count):
    tokens = np.arange(n)
    shape = {"batch_size": batch, "block_size": block_size}
    windows = -(-(n - 1) // block_size)
    batches = list(evaluation_batches(tokens, **shape, n_batches=count))
    starts = [i for part in batches for i in part["ids"][part["targets"][:, 0] != NO_TARGET, 0]]
    assert len(starts) == min(windows, count * batch)
    assert len(set(starts)) == len(starts)
    gaps = np.diff([*starts, windows * block_size])
    assert gaps.max() - gaps.min() <= block_size  # spread evenly


def test_ids_outside_the_vocabulary_are_refused_by_value():
    check_ids(np.array([[0, 6]]), 7)
    with pytest.raises(ValueError, match="token id 7 is outside the vocabulary of 7"):
        check_ids(np.array([[0, 7]]), 7)


# ------------------------------------------------------------------------------------------
# Examples of different lengths


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=300),
    st.integers(1, 7),
    seeds,
    st.integers(0, 9),
)
def test_an_epoch_has_each_example_once_in_batches_of_like_length(lengths, size, seed, epoch):
    lengths = np.array(lengths)
    groups = epoch_groups(lengths, batch_size=size, seed=seed, epoch=epoch)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(lengths)))
    assert sorted(map(len, groups))[1:] == [size] * (len(groups) - 1)
    again = epoch_groups(lengths, batch_size=size, seed=seed, epoch=epoch)
    assert all(np.array_equal(*pair) for pair in zip(groups, again, strict=True))
    if len(lengths) <= POOL * size:  # sorted as a whole
        shortest = sorted((lengths[g].min(), lengths[g].max()) for g in groups)
        assert all(a[1] <= b[0] for a, b in pairwise(shortest))


def test_epochs_differ_in_their_batches_and_in_the_order_of_these():
    lengths = np.arange(1000) % 37
    first, second = (epoch_groups(lengths, batch_size=8, seed=1, epoch=e) for e in (0, 1))
    assert {tuple(sorted(g)) for g in first} != {tuple(sorted(g)) for g in second}
    one_pool = epoch_groups(np.arange(100), batch_size=8, seed=1, epoch=0)
    maxima = [group.max() for group in one_pool]
    assert maxima != sorted(maxima)
