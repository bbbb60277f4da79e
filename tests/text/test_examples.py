"""Laws of labelled texts as arrays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanolm.text.examples import (
    ENOUGH_SOURCES,
    Examples,
    file_length,
    label_names,
    packed,
    split_records,
)
from nanolm.text.records import Record

example = st.tuples(
    st.lists(st.integers(0, 99), max_size=6),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=3),
)


def several(files: list[int]) -> bool:
    return len(set(files)) >= ENOUGH_SOURCES


def record(label: str, source: str = "a") -> Record:
    return Record(("text",), (label,), source, "a, line 1")


@given(st.lists(example, max_size=6))
def test_examples_come_back_as_they_were_packed(examples):
    array = packed(examples)
    n_labels = sum(len(labels) for _, labels in examples)
    n_ids = sum(len(ids) for ids, _ in examples)
    assert len(array) == file_length(len(examples), n_labels, n_ids)
    opened = Examples(array, len(examples), n_labels)
    assert len(opened) == len(examples)
    assert opened.lengths.tolist() == [len(ids) for ids, _ in examples]
    for i, (ids, labels) in enumerate(examples):
        assert opened[i][0].tolist() == ids
        assert opened[i][1].tolist() == [list(pair) for pair in labels]


@given(
    st.lists(st.sampled_from("abc"), min_size=20, max_size=60),
    st.sampled_from([0.1, 0.25, 0.5]),
)
def test_of_few_files_each_label_gives_its_share_to_validation(labels, fraction):
    records = [Record((str(i),), (label,), "a", "") for i, label in enumerate(labels)]
    train, val = split_records(records, fraction)
    assert sorted(train + val) == sorted(records)
    assert (train, val) == split_records(records, fraction)
    for label in set(labels):
        n = labels.count(label)
        assert abs(sum(r.labels == (label,) for r in val) - n * fraction) <= 0.5


@given(st.lists(st.integers(0, 9), min_size=30, max_size=60).filter(several))
def test_of_many_files_whole_ones_are_kept_for_validation(files):
    """So that no text is judged by another one of its own file."""
    records = [Record((str(i),), ("x",), str(file), "") for i, file in enumerate(files)]
    train, val = split_records(records, 0.2)
    assert sorted(train + val) == sorted(records)
    assert not {r.source for r in train} & {r.source for r in val}
    if min(map(files.count, files)) < 0.4 * len(files):  # one of them is small enough
        assert 0 < len(val) < 0.4 * len(records)  # nearer to 0.2 than nothing


def test_no_label_is_left_without_a_text_for_training():
    """Here all of one label's are in one file."""
    records = [Record((str(i),), ("ab"[i >= 90],), str(i // 10), "") for i in range(100)]
    for fraction in (0.1, 0.5, 0.8):
        train, val = split_records(records, fraction)
        assert {r.labels for r in train} == {("a",), ("b",)}
        assert val


def test_too_few_texts_are_told_so():
    with pytest.raises(ValueError, match=r"3 examples are too few for val_fraction=0\.1"):
        split_records([record("a")] * 3, 0.1)


def test_numbers_come_before_names_and_by_their_size():
    records = [record(name) for name in ("b", "10", "a", "-1", "9")]
    assert label_names(records, []) == ("-1", "9", "10", "a", "b")


def test_a_label_alone_too_many_and_an_unseen_one_are_refused():
    pair = [record("a"), record("b")]
    with pytest.raises(ValueError, match="one label in the training texts, 'a': 2 to 1,000 can"):
        label_names(pair[:1], [])
    with pytest.raises(ValueError, match="10,000 labels in the training texts: 2 to 1,000"):
        label_names([record(str(i)) for i in range(10_000)], [])
    with pytest.raises(ValueError, match="a, line 1: label 'c' is in no training text"):
        label_names(pair, [record("c")])


def test_the_largest_number_is_not_wrapped():
    with pytest.raises(OverflowError):
        packed([([2**31], [])])
    assert packed([([2**31 - 1], [])]).dtype == np.dtype("<i4")
