"""The task of tagging: one label for each word, as for names in a text.

A word may be several tokens; the first of them answers (Devlin et al. 2019, section 5.3).
"""

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from nanolm.batches import Batch
from nanolm.loss import NO_TARGET
from nanolm.model import Transformer
from nanolm.tasks import scores
from nanolm.tasks.labelled import LabelledTask
from nanolm.text.records import Record
from nanolm.text.tokenizer import Tokenizer, framed


class TaggingTask(LabelledTask):
    """What is particular to labels of words."""

    reads = "tagging"
    head = "words"
    best_by = ("accuracy", "macro_f1", "entity_f1")
    unit = "word"

    @staticmethod
    def encode(
        record: Record, tokenizer: Tokenizer, names: Sequence[str]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a sentence, and the labels of its words at the first token of each."""
        ids, places = word_places(record.parts, tokenizer)
        number = {name: i for i, name in enumerate(names)}
        found = zip(places, record.labels, strict=True)
        return ids, [(place, number[label]) for place, label in found if label is not None]

    def targets(self, pairs: Sequence[np.ndarray], lengths: np.ndarray) -> Batch:
        """The labels of the words, and the places of their first tokens, (B, P) each."""
        kept = [row[row[:, 0] < n] for row, n in zip(pairs, lengths, strict=True)]
        places = np.zeros((len(kept), max(1, *map(len, kept))), np.int64)
        targets = np.full_like(places, NO_TARGET)
        for i, row in enumerate(kept):
            places[i, : len(row)], targets[i, : len(row)] = row.T
        return {"places": places, "targets": targets}

    @property
    def has_names(self) -> bool:
        """Whether the labels are BIO tags."""
        return all(label == "O" or label[:2] in ("B-", "I-") for label in self.labels)

    def own_counts(self, targets: np.ndarray, guesses: np.ndarray) -> np.ndarray:
        """Names found, guessed and there."""
        total = np.zeros(3)
        for wanted, found in zip(targets, guesses, strict=True) if self.has_names else ():
            kept = wanted != NO_TARGET
            tags = ([self.labels[i] for i in row[kept]] for row in (wanted, found))
            total += scores.span_counts(*tags)
        return total

    def own_scores(self, counts: Tensor) -> dict[str, float]:
        """F1 of names, where the labels are BIO tags."""
        f1 = scores.precision_recall_f1(*counts[-3:].numpy())[2]
        return {"entity_f1": float(f1)} if self.has_names else {}

    def question(self, text: str, tokenizer: Tokenizer) -> Batch:
        """The batch of a text alone, with the places of its words."""
        ids, places = word_places(text.split(), tokenizer)
        batch, _ = self.inputs([ids], tokenizer)
        return batch | {"places": np.array([[i for i in places if i < self.block_size]])}

    def answer(
        self, model: Transformer, tokenizer: Tokenizer, text: str, **options: object
    ) -> list[Iterator[str]]:
        """The words of a text, a line each, with their labels."""
        p = self.probabilities(model, self.question(text, tokenizer))
        found = zip(text.split(), p.argmax(dim=-1).tolist(), p.amax(dim=-1).tolist(), strict=False)
        return [iter(["\n".join(f"{word}\t{self.labels[i]} {s:.1%}" for word, i, s in found)])]


def word_places(words: Sequence[str], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids of words with blanks between them, and the place of the first token of each."""
    rows = [tokenizer.encode(f" {word}" if i else word) for i, word in enumerate(words)]
    places = np.cumsum([len(framed(tokenizer)), *map(len, rows)])[:-1].tolist()
    return framed(tokenizer, [i for row in rows for i in row]), places
