"""Laws of datasets and batches."""

import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nanolm.corpus import Corpus
from nanolm.data import (
    NO_TARGET,
    check_dataset,
    check_ids,
    epoch_starts,
    evaluation_batches,
    narrowest_dtype,
    open_dataset,
    prepare,
    training_batch,
    windows_per_epoch,
    write_dataset,
)
from nanolm.tokenizer import CharTokenizer

lengths = st.integers(2, 400)
block_sizes = st.integers(1, 50)
seeds = st.integers(0, 2**32)


# ------------------------------------------------------------------------------------------
# Batches


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


def test_a_text_of_one_window_is_enough():
    assert windows_per_epoch(6, 5) == 1
    with pytest.raises(ValueError, match=r"block_size=6.* needs 7 tokens and there are 6"):
        windows_per_epoch(6, 6)


@given(lengths, block_sizes, seeds, st.integers(1, 7), st.integers(0, 50))
def test_a_batch_is_windows_of_the_text_and_their_next_tokens(n, block_size, seed, batch, index):
    assume(n > block_size)
    tokens = np.arange(n)  # each token tells its place
    ids, targets = training_batch(
        tokens, index, batch_size=batch, block_size=block_size, seed=seed
    )
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
        for start in training_batch(np.arange(n), index, **shape)[0][:, 0]
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
        assert all(np.array_equal(a, b) for a, b in zip(batches[index], again, strict=True))


def test_seeds_and_epochs_order_the_windows_differently():
    orders = {tuple(epoch_starts(1000, 5, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@given(lengths, block_sizes, st.integers(1, 7))
def test_a_whole_evaluation_predicts_every_token_but_the_first_once(n, block_size, batch):
    tokens = np.arange(n)
    seen = []
    for ids, targets in evaluation_batches(tokens, batch_size=batch, block_size=block_size):
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
    starts = [i for ids, targets in batches for i in ids[targets[:, 0] != NO_TARGET, 0]]
    assert len(starts) == min(windows, count * batch)
    assert len(set(starts)) == len(starts)
    gaps = np.diff([*starts, windows * block_size])
    assert gaps.max() - gaps.min() <= block_size  # spread evenly


def test_ids_outside_the_vocabulary_are_refused_by_value():
    check_ids(np.array([[0, 6]]), 7)
    with pytest.raises(ValueError, match="token id 7 is outside the vocabulary of 7"):
        check_ids(np.array([[0, 7]]), 7)


# ------------------------------------------------------------------------------------------
# Files


@given(st.integers(1, 2**31))
def test_the_narrowest_type_holds_the_largest_id(vocab_size):
    """Ids written as uint16 wrap silently: 70000 would become 4464."""
    dtype = narrowest_dtype(vocab_size)
    assert np.array([vocab_size - 1]).astype(dtype)[0] == vocab_size - 1
    assert dtype.kind == "u"
    if dtype.itemsize > 1:
        assert dtype.str[0] == "<"
        assert vocab_size - 1 >= 256 ** (dtype.itemsize // 2)


def corpus_of(*documents: str) -> Corpus:
    return Corpus("a test", lambda: list(documents))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5),
    st.floats(0.05, 0.95),
)
def test_a_written_dataset_holds_the_text(tmp_path_factory, documents, val_fraction):
    text = "".join(documents)
    cut = int(len(text) * (1 - val_fraction))
    assume(cut >= 2 and len(text) - cut >= 2)
    workplace = tmp_path_factory.mktemp("data")
    tokenizer = CharTokenizer.train(documents)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        corpus = corpus_of(*documents)
        write_dataset(workplace / "data" / "x", corpus, tokenizer, val_fraction=val_fraction)
        dataset = open_dataset("x")
        assert check_dataset("x") == dataset.meta
    train, val = tokenizer.decode(dataset.train), tokenizer.decode(dataset.val)
    assert (train, val) == (text[:cut], text[cut:])
    for split, part in (("train", train), ("val", val)):
        assert dataset.meta[split]["tokens"] == len(part)
        assert dataset.meta[split]["bytes"] == len(part.encode())
    assert dataset.bytes_per_token == len(val.encode()) / len(val)


def test_a_failed_preparation_leaves_the_old_dataset(workplace):
    """Nothing is lost, and nothing is half written."""
    (workplace / "a.txt").write_text("to be or not to be")
    (workplace / "short.txt").write_text("ab")
    prepare("x", inputs=("a.txt",))
    before = {path.name: path.read_bytes() for path in (workplace / "data/x").iterdir()}
    with pytest.raises(ValueError, match="too short"):
        prepare("x", inputs=("short.txt",))
    assert before == {path.name: path.read_bytes() for path in (workplace / "data/x").iterdir()}


def test_a_killed_preparation_leaves_no_dataset_that_could_be_taken_for_one(
    workplace, monkeypatch
):
    """Killed at any rename, the folder opens as the old text, as the new one, or not at all."""
    import os

    (workplace / "a.txt").write_text("to be or not to be")
    (workplace / "b.txt").write_text("that is the question")
    replace, outcomes = os.replace, []
    for survived in range(20):
        prepare("x", inputs=("a.txt",))
        calls = iter(range(1000))

        def replace_until_killed(source, target, calls=calls, survived=survived):
            if next(calls) >= survived:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", replace_until_killed)
        try:
            prepare("x", inputs=("b.txt",))
            finished = True
        except KeyboardInterrupt:
            finished = False
        monkeypatch.setattr(os, "replace", replace)
        try:
            check_dataset("x")
            dataset = open_dataset("x")
            ids = [*dataset.train, *dataset.val]
            outcomes.append(dataset.tokenizer.decode(ids)[:2])
        except FileNotFoundError:
            outcomes.append("--")
        if finished:
            break
    assert set(outcomes) == {"to", "--", "th"}
    assert outcomes == sorted(outcomes, key=["to", "--", "th"].index)


def test_the_meta_file_tells_where_the_text_is_from(workplace):
    (workplace / "a.txt").write_text("to be or not to be")
    meta = json.loads((prepare("x", inputs=("a.txt",)) / "meta.json").read_text())
    assert meta["source"] == "a.txt"
    assert meta["tokenizer"] == "char"
    assert meta["vocab_size"] == len(set("to be or not to be"))


def test_a_known_dataset_is_prepared_on_first_use(workplace, monkeypatch):
    from nanolm import data
    from nanolm.corpus import KnownDataset

    known = {"tiny": KnownDataset(lambda folder: corpus_of("to be or not to be"), "char")}
    monkeypatch.setattr(data, "KNOWN_DATASETS", known)
    assert open_dataset("tiny").meta["source"] == "a test"
    meta = workplace / "data/tiny/meta.json"
    meta.write_text(meta.read_text().replace('"char"', '"other"'))
    with pytest.raises(ValueError, match=r"'other'.* prepare it again: python prepare.py tiny"):
        open_dataset("tiny")
