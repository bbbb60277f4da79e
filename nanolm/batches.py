"""Batches as a pure function of the step.

Batches need no loader and no state. An epoch cuts the training tokens into windows of block_size
that do not overlap, from an offset drawn anew for each epoch (windows at fixed places would always
show the model the same beginnings), and shuffles them; both draws depend on (seed, epoch) alone.
Micro-batch i of a run is then the i-th group of batch_size windows in this endless sequence,
whoever asks, whenever.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from nanolm.loss import NO_TARGET

# The arguments of a model's forward by name; "targets" are always among them.
Batch = dict[str, np.ndarray]


def windows_per_epoch(n_tokens: int, block_size: int) -> int:
    """How many windows of block_size inputs, each with its targets, an epoch cuts out of n_tokens.

    One fewer than fit, which leaves room to shift them all by up to a window: 11 tokens hold three
    windows of 3, and an epoch takes two. Raises ValueError where not even one fits.
    """
    if n_tokens < block_size + 1:
        raise ValueError(
            f"text too short for block_size={block_size}: a window needs {block_size + 1} tokens "
            f"and there are {n_tokens}; choose a smaller block_size, or prepare more text"
        )
    return max(1, (n_tokens - 1) // block_size - 1)


@lru_cache(maxsize=2)  # a batch may span two epochs
def epoch_starts(n_tokens: int, block_size: int, seed: int, epoch: int) -> np.ndarray:
    """Where the windows of an epoch start, in the order in which they are seen."""
    n = windows_per_epoch(n_tokens, block_size)
    random = np.random.default_rng((seed, epoch))
    offset = random.integers(n_tokens - n * block_size)  # so that the last window can end the text
    return offset + block_size * random.permutation(n)


def training_batch(
    tokens: np.ndarray, index: int, *, batch_size: int, block_size: int, seed: int
) -> Batch:
    """Micro-batch number index of a run: "ids" and their "targets", the next ids.

    (B, T) int64 each.
    """
    n = windows_per_epoch(len(tokens), block_size)
    numbers = range(index * batch_size, (index + 1) * batch_size)
    starts = [epoch_starts(len(tokens), block_size, seed, i // n)[i % n] for i in numbers]
    places = np.add.outer(starts, np.arange(block_size + 1))
    windows = tokens[places].astype(np.int64)  # (B, T + 1)
    return {"ids": windows[:, :-1], "targets": windows[:, 1:]}


def evaluation_batches(
    tokens: np.ndarray, *, batch_size: int, block_size: int, n_batches: int = 0
) -> Iterator[Batch]:
    """Fixed windows that never overlap: all, or n_batches batches spread evenly over the split.

    Yields "ids" and "targets", (B, T) int64 each. The whole split predicts each token but the
    first exactly once: what is missing in the last window and in the last batch is filled up
    with NO_TARGET.
    """
    starts = np.arange(0, len(tokens) - 1, block_size)
    if 0 < n_batches * batch_size < len(starts):
        chosen = np.arange(n_batches * batch_size) * len(starts) // (n_batches * batch_size)
        starts = starts[chosen]
    for first in range(0, len(starts), batch_size):
        ids = np.zeros((batch_size, block_size), np.int64)
        targets = np.full((batch_size, block_size), NO_TARGET, np.int64)
        for row, start in enumerate(starts[first : first + batch_size]):
            window = tokens[start : start + block_size + 1]
            ids[row, : len(window) - 1] = window[:-1]
            targets[row, : len(window) - 1] = window[1:]
        yield {"ids": ids, "targets": targets}


POOL = 16  # batches within which examples are sorted by their length


def epoch_groups(
    lengths: np.ndarray, *, batch_size: int, seed: int, epoch: int
) -> list[np.ndarray]:
    """The batches of an epoch of examples of different lengths, as their numbers, each once.

    Examples of similar length come together, for the shorter ones of a batch are filled up: they
    are shuffled, sorted by length in pools of some batches, and the batches are shuffled again.
    The last one of an epoch may be smaller.
    """
    random = np.random.default_rng((seed, epoch))
    order = random.permutation(len(lengths))
    groups = []
    for first in range(0, len(order), POOL * batch_size):
        pool = order[first : first + POOL * batch_size]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        groups += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    return [groups[i] for i in random.permutation(len(groups))]


def token_groups(
    lengths: np.ndarray, *, batch_tokens: int, seed: int, epoch: int
) -> list[np.ndarray]:
    """The same with about batch_tokens tokens in each batch, its padding included.

    lengths: (n,), or (n, 2) of sources and their answers, which are filled up apart. A longer
    example is a batch of its own.
    """
    random, lengths = np.random.default_rng((seed, epoch)), lengths.reshape(len(lengths), -1)
    order = random.permutation(len(lengths))  # among those of one length
    order = order[np.lexsort(lengths[order].T)]
    groups, first, longest = [], 0, lengths[order[0]]
    for i, own in enumerate(lengths[order]):
        longest = np.maximum(longest, own)
        if i > first and longest.sum() * (i + 1 - first) > batch_tokens:
            groups.append(order[first:i])
            first, longest = i, own
    groups.append(order[first:])
    return [groups[i] for i in random.permutation(len(groups))]


def packed_rows(lengths: np.ndarray, *, block_size: int, seed: int) -> list[list[int]]:
    """Rows of at most block_size tokens, each of several examples, as their numbers, each once.

    lengths: 1 to block_size each. Best fit: each example, in a drawn order, comes into the fullest
    row that has room for it (Ding et al. 2024 pack documents so).
    """
    rooms, rows = [[] for _ in range(block_size + 1)], []  # rooms: the rows by the room they have
    for number in np.random.default_rng(seed).permutation(len(lengths)).tolist():
        n = int(lengths[number])
        room = next((room for room in range(n, block_size) if rooms[room]), block_size)
        row = rooms[room].pop() if rooms[room] else []
        if not row:
            rows.append(row)
        row.append(number)
        rooms[room - n].append(row)
    return rows


def check_ids(ids: np.ndarray, vocab_size: int) -> None:
    """Raise ValueError where an id has no embedding, before a GPU fails without a word."""
    if ids.size and ids.max() >= vocab_size:
        raise ValueError(
            f"token id {ids.max()} is outside the vocabulary of {vocab_size}: the dataset is "
            "damaged; prepare it again with prepare.py"
        )
