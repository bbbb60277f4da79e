"""Scores of labels: what is counted, and what the counts mean.

All scores of a classifier follow from its confusion matrix, which adds up over batches and
processes: how often a label (row) was taken for which (column). Of a label, the precision is the
share of right ones among its guesses, the recall the share that was found, and F1 their harmonic
mean. Names in a text are runs of tags, B-PER I-PER ...; one counts as found where its kind, its
beginning and its end are right (Tjong Kim Sang & De Meulder 2003).

Where there is nothing to divide, a score is 0.
"""

import math

import numpy as np


def confusion(targets: np.ndarray, guesses: np.ndarray, n: int) -> np.ndarray:
    """How often label i was taken for label j, (n, n); of arrays of one shape."""
    return np.bincount(targets.ravel() * n + guesses.ravel(), minlength=n * n).reshape(n, n)


def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole; 0 where whole is."""
    part, whole = np.asarray(part, float), np.asarray(whole, float)
    return np.divide(part, whole, out=np.zeros_like(part), where=whole != 0)


def precision_recall_f1(
    hits: np.ndarray, guessed: np.ndarray, wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The three scores, from how many were found, guessed and there."""
    return share(hits, guessed), share(hits, wanted), share(2 * hits, guessed + wanted)


def label_scores(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 of each label: (n,) each."""
    return precision_recall_f1(matrix.diagonal(), matrix.sum(axis=0), matrix.sum(axis=1))


def accuracy(matrix: np.ndarray) -> float:
    """The share of right guesses, which is precision, recall and F1 of all labels together."""
    return float(share(matrix.trace(), matrix.sum()))


def macro_f1(matrix: np.ndarray) -> float:
    """The mean F1 of the labels that occur: each counts the same, however rare."""
    occurs = matrix.sum(axis=0) + matrix.sum(axis=1) > 0
    return float(label_scores(matrix)[2][occurs].mean()) if occurs.any() else 0.0


def matthews(matrix: np.ndarray) -> float:
    """The correlation of labels and guesses, -1 to 1 (Matthews 1975; Gorodkin 2004 for many)."""
    matrix = np.asarray(matrix, float)
    wanted, guessed, n = matrix.sum(axis=1), matrix.sum(axis=0), matrix.sum()
    spread = (n**2 - wanted @ wanted) * (n**2 - guessed @ guessed)
    return float(share(matrix.trace() * n - wanted @ guessed, math.sqrt(spread)))


def spans(tags: list[str]) -> set[tuple[str, int, int]]:
    """What is named in a sentence of BIO tags: (kind, begin, end) of each name.

    Strictly: B-X begins one, the I-X right behind it belong to it, and any other I-X names nothing
    (Ramshaw & Marcus 1995; IOB2).
    """
    found, begin = set(), None
    for place, tag in enumerate([*tags, "O"]):
        if begin is not None and tag != f"I-{tags[begin][2:]}":
            found.add((tags[begin][2:], begin, place))
            begin = None
        if tag.startswith("B-"):
            begin = place
    return found


def span_counts(targets: list[str], guesses: list[str]) -> np.ndarray:
    """How many names of a sentence are found, guessed and there: (3,)."""
    there, guessed = spans(targets), spans(guesses)
    return np.array([len(there & guessed), len(guessed), len(there)])
