"""Scores of labels and of texts: what is counted, and what the counts mean.

All scores of a classifier follow from its confusion matrix, which adds up over batches and
processes: how often a label (row) was taken for which (column). Of a label, the precision is the
share of right ones among its guesses, the recall the share that was found, and F1 their harmonic
mean. Names in a text are runs of tags, B-PER I-PER ...; one counts as found where its kind, its
beginning and its end are right (Tjong Kim Sang & De Meulder 2003).

A text is compared with a given one by what they share: runs of words (BLEU) or of characters
(chrF), the longest common subsequence of their words (ROUGE-L), or their words in any order (F1).

Where there is nothing to divide, a score is 0.
"""

import html
import math
import re
import string
from collections import Counter
from collections.abc import Sequence

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


# ------------------------------------------------------------------------------------------
# Texts

WORDS, CHARACTERS = 4, 6  # the longest runs of BLEU and of chrF
TEXT_SCORES = ("bleu", "chrf", "rouge_l", "exact", "f1")
# In turn: where a blank comes between marks and words (mteval-v13a, the script of the WMT).
CUTS = (
    (r"([\{-\~\[-\` -\&\(-\+\:-\@\/])", r" \1 "),
    (r"([^0-9])([\.,])", r"\1 \2 "),
    (r"([\.,])([^0-9])", r" \1 \2"),
    (r"([0-9])(-)", r"\1 \2 "),
)


def words_13a(text: str) -> list[str]:
    """The words and marks of a text, as BLEU counts them; its tokenization makes the number."""
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for name in ("&quot;", "&amp;", "&lt;", "&gt;"):
        text = text.replace(name, html.unescape(name))
    text = f" {text} "
    for pattern, put in CUTS:
        text = re.sub(pattern, put, text)
    return text.split()


def plain_words(text: str) -> list[str]:
    """The words that ROUGE counts: of lower-case letters a to z and digits."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).split()


def bare_words(text: str) -> list[str]:
    """The words that SQuAD counts: without marks and articles (Rajpurkar et al. 2016)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def run_counts(found: Sequence, wanted: Sequence, longest: int) -> np.ndarray:
    """For runs of 1 to longest items: how many are shared, found and wanted, (longest, 3)."""
    counts = np.zeros((longest, 3))
    for n in range(1, longest + 1):
        runs = [
            Counter(tuple(items[i : i + n]) for i in range(len(items) - n + 1))
            for items in (found, wanted)
        ]
        counts[n - 1] = (runs[0] & runs[1]).total(), runs[0].total(), runs[1].total()
    return counts


def common_length(one: Sequence, other: Sequence) -> int:
    """The length of the longest sequence that both have in its order, maybe with gaps."""
    row = [0] * (len(other) + 1)  # of the first items of one, with the first j of the other
    for item in one:
        before = row
        row = [0]
        for j, its in enumerate(other):
            row.append(before[j] + 1 if item == its else max(before[j + 1], row[j]))
    return row[-1]


def shared_f1(n: int, found: Sequence, wanted: Sequence) -> float:
    """F1 of n items that two sequences share."""
    return float(precision_recall_f1(n, len(found), len(wanted))[2])


def text_counts(found: str, wanted: str) -> np.ndarray:
    """What the scores of a text against a given one need; counts of texts add up."""
    runs = run_counts(words_13a(found), words_13a(wanted), WORDS)
    letters = ("".join(text.split()) for text in (found, wanted))
    character_runs = run_counts(*letters, CHARACTERS)
    character_runs[:, 1] *= character_runs[:, 2] > 0  # a run longer than the given text is no miss
    pair = plain_words(found), plain_words(wanted)
    rouge = shared_f1(common_length(*pair), *pair)
    bare = bare_words(found), bare_words(wanted)
    exact = float(bare[0] == bare[1])
    shared = (Counter(bare[0]) & Counter(bare[1])).total()
    f1 = shared_f1(shared, *bare) if bare[0] and bare[1] else exact
    return np.array([*runs.ravel(), *character_runs.ravel(), rouge, exact, f1, 1.0])


def text_scores(counts: np.ndarray) -> dict[str, float]:
    """The scores, by the names of TEXT_SCORES, from sums of text_counts.

    BLEU (Papineni et al. 2002) and chrF (Popović 2015) go to 100, as sacrebleu gives them (Post
    2018); the others, means over the texts, to 1: ROUGE-L (Lin 2004), exact match and F1.
    """
    runs, rest = counts[: WORDS * 3].reshape(WORDS, 3), counts[WORDS * 3 :]
    character_runs = rest[: CHARACTERS * 3].reshape(CHARACTERS, 3)
    means = share(rest[-4:-1], rest[-1]).tolist()
    values = (bleu(runs), chrf(character_runs), *means)
    return dict(zip(TEXT_SCORES, values, strict=True))


def bleu(runs: np.ndarray) -> float:
    """The geometric mean of the precisions of runs of 1 to 4 words, less where it is too short.

    A precision of 0 counts as half a match, then as a quarter and so on (Lin & Och 2004).
    """
    shared, found, wanted = runs.T
    if not shared.any() or not found.all():
        return 0.0
    zero = shared == 0
    precisions = np.where(zero, 0.5 ** zero.cumsum(), shared) / found
    brevity = min(0.0, 1 - wanted[0] / found[0])  # of single words
    return float(100 * np.exp(brevity + np.log(precisions).mean()))


def chrf(runs: np.ndarray, beta: float = 2.0) -> float:
    """F of the mean precision and recall of runs of 1 to 6 characters; recall counts double."""
    shared, found, wanted = runs[(runs[:, 1] > 0) & (runs[:, 2] > 0)].T
    precision, recall = (share((shared / n).sum(), len(n)) for n in (found, wanted))
    return float(100 * share((1 + beta**2) * precision * recall, beta**2 * precision + recall))
