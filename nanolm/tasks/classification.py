"""The task of classification: one label for a text, or for a pair of texts.

An encoder reads it whole. BERT's kind answers at the first token (Devlin et al. 2019), others from
the mean of all; a decoder at the last token, the only one that has seen the rest (Radford et al.
2018).
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from nanolm.batches import Batch
from nanolm.model import Transformer
from nanolm.tasks import scores
from nanolm.tasks.labelled import LabelledTask, framed
from nanolm.text.records import Record
from nanolm.text.tokenizer import Tokenizer

SHOWN = 5  # labels of an answer


class ClassificationTask(LabelledTask):
    """What is particular to labels of texts."""

    reads = "classification"
    head = "text"
    best_by = ("accuracy", "macro_f1", "mcc")

    @staticmethod
    def encode(
        record: Record, tokenizer: Tokenizer, names: Sequence[str]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a record, and its label."""
        ids = framed(tokenizer, *map(tokenizer.encode, record.parts))
        return ids, [(0, names.index(record.labels[0]))]

    @staticmethod
    def guesses(
        train: Sequence[Record], val: Sequence[Record], names: Sequence[str]
    ) -> dict[str, float]:
        """Scores of the label that is the most frequent one in training, for every text."""
        most = Counter(record.labels[0] for record in train).most_common(1)[0][0]
        wanted = np.array([names.index(record.labels[0]) for record in val])
        matrix = scores.confusion(wanted, np.full_like(wanted, names.index(most)), len(names))
        return {
            f"accuracy of {most!r} for all": scores.accuracy(matrix),
            f"macro F1 of {most!r} for all": scores.macro_f1(matrix),
        }

    def places(self, lengths: np.ndarray) -> Batch:
        """Where the model answers."""
        if self.causal:
            return {"places": lengths[:, None] - 1}
        return {} if self.norm_first else {"places": np.zeros_like(lengths[:, None])}

    def targets(self, pairs: Sequence[np.ndarray], lengths: np.ndarray) -> Batch:
        """The label of each text, (B, 1)."""
        labels = np.array([row[:1, 1] for row in pairs], np.int64)
        return {"targets": labels} | self.places(lengths)

    def own_scores(self, counts: Tensor) -> dict[str, float]:
        """Matthews correlation."""
        return {"mcc": scores.matthews(self.matrix(counts))}

    @classmethod
    def answer(
        cls, model: Transformer, tokenizer: Tokenizer, text: str, **options: object
    ) -> list[Iterator[str]]:
        """The likeliest labels of a text; of two, with the token that ends a text between them."""
        task, ids = cls.of(model.config), tokenizer.encode(text, allowed_special="all")
        batch, lengths = task.inputs([framed(tokenizer, ids)], tokenizer)
        p = task.probabilities(model, batch | task.places(lengths))[0]
        best = p.topk(min(SHOWN, len(p)))
        found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [iter(["  ".join(f"{task.labels[i]} {share:.1%}" for i, share in found)])]

    def labelled(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        ids: np.ndarray,
        pairs: np.ndarray,
        tokens: int,
    ) -> str:
        """The beginning of a text, and its label as the model has it."""
        batch, lengths = self.inputs([ids], tokenizer)
        guess = self.probabilities(model, batch | self.places(lengths))[0].argmax().item()
        wanted = pairs[0, 1]
        wrong = "" if guess == wanted else f", not {self.labels[wanted]}"
        beginning = " ".join(tokenizer.decode(ids[: max(1, tokens // 4)].tolist()).split())
        return f"[{self.labels[guess]}{wrong}] {beginning}"
