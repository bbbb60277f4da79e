"""Labelled texts as arrays on disk: the ids of all of them, where each begins, and the labels.

A file is one array of int32: for each example, and for the end, where its ids and its labels
begin; then all labels, each with the place of its token; then all ids. It is mapped into memory,
so that only what is asked for is read.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from nanolm.text.records import Record

DTYPE = np.dtype("<i4")
MOST_LABELS = 1000
ENOUGH_SOURCES = 5  # files or documents, so that some of them can be the validation split


class Examples:
    """The examples of a split."""

    def __init__(self, array: np.ndarray, n: int, n_labels: int):
        """array: as in the file; n, n_labels: how many examples and labels it holds."""
        table, rest = array[: 2 * n + 2], array[2 * n + 2 :]
        self.starts = table.reshape(n + 1, 2)  # of ids, of labels
        self.labels = rest[: 2 * n_labels].reshape(n_labels, 2)  # place, label
        self.ids = rest[2 * n_labels :]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids of example i, (T,), and its labels, (P, 2): place and number of each."""
        (begin, first), (end, last) = self.starts[i : i + 2]
        return self.ids[begin:end], self.labels[first:last]

    @property
    def lengths(self) -> np.ndarray:
        """How many ids each example has."""
        return np.diff(self.starts[:, 0])


def file_length(n: int, n_labels: int, n_ids: int) -> int:
    """How many numbers the file of so many examples, labels and ids holds."""
    return 2 * (n + 1) + 2 * n_labels + n_ids


def packed(examples: Sequence[tuple[list[int], list[tuple[int, int]]]]) -> np.ndarray:
    """Examples, (ids, [(place, label), ...]) each, as one array."""
    sizes = [(0, 0), *((len(ids), len(labels)) for ids, labels in examples)]
    labels = [number for _, pairs in examples for pair in pairs for number in pair]
    ids = [i for ids, _ in examples for i in ids]
    return np.array([*np.cumsum(sizes, axis=0).ravel().tolist(), *labels, *ids], DTYPE)


def label_names(records: Sequence[Record], val: Sequence[Record]) -> tuple[str, ...]:
    """The labels of the training records, numbers by size, then names by their alphabet.

    Raises ValueError where there is one alone, or too many; or another one among val.
    """
    names = {label for record in records for label in record.labels} - {None}
    if not 1 < len(names) <= MOST_LABELS:
        what = "one label" if len(names) == 1 else f"{len(names):,} labels"
        hint = f", {next(iter(names))!r}" if len(names) == 1 else ""
        raise ValueError(
            f"{what} in the training texts{hint}: 2 to {MOST_LABELS:,} can be told apart"
        )
    for record in val:
        for label in record.labels:
            if label not in names and label is not None:
                raise ValueError(f"{record.where}: label {label!r} is in no training text")
    return tuple(sorted(names, key=in_order))


def in_order(name: str) -> tuple[bool, int, str]:
    """What labels are sorted by."""
    number = int(name) if name.removeprefix("-").isdecimal() else None
    return number is None, number or 0, name


def split_records(records: list[Record], fraction: float) -> tuple[list[Record], list[Record]]:
    """Training and validation records, of each label about its share.

    Whole files or documents where there are enough of them: each is taken that brings the shares
    of its labels nearer. No label is left without a text for training, and the same records are
    always split alike. Raises ValueError where there are too few.
    """
    groups, by_source = defaultdict(list), len({r.source for r in records}) >= ENOUGH_SOURCES
    for i, record in enumerate(records):
        groups[record.source if by_source else i].append(i)
    parts, chosen, held = list(groups.values()), set(), Counter()
    total = Counter(label for record in records for label in record.labels)
    for number in np.random.default_rng(0).permutation(len(parts)):
        own = Counter(label for i in parts[number] for label in records[i].labels)
        gain = sum(
            abs(held[k] / total[k] - fraction) - abs((held[k] + n) / total[k] - fraction)
            for k, n in own.items()
        )
        if gain > 0 and all(held[k] + n < total[k] for k, n in own.items()):
            chosen.update(parts[number])
            held += own
    train, val = ([r for i, r in enumerate(records) if (i in chosen) == kept] for kept in (0, 1))
    if not train or not val:
        raise ValueError(
            f"{len(records)} examples are too few for val_fraction={fraction}: give more, "
            "or others with --val_input FILE"
        )
    return train, val
