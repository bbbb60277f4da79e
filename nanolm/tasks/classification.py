"""The task of classification: one label for a text, or for a pair of texts.

An encoder reads it whole. BERT's kind answers at the first token (Devlin et al. 2019), others from
the mean of all; a decoder at the last token, the only one that has seen the rest (Radford et al.
2018).
"""

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from nanolm.batches import Batch
from nanolm.model import Transformer
from nanolm.tasks import scores
from nanolm.tasks.labelled import LabelledTask
from nanolm.text.records import Record
from nanolm.text.tokenizer import Tokenizer, framed

SHOWN = 5  # labels of an answer


class ClassificationTask(LabelledTask):
    """What is particular to labels of texts."""

    reads = "classification"
    head = "text"
    best_by = ("accuracy", "macro_f1", "mcc")
    unit = None  # the usual label of a text that is new is that of all

    @staticmethod
    def encode(
        record: Record, tokenizer: Tokenizer, names: Sequence[str]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a record, and its label."""
        ids = framed(tokenizer, *map(tokenizer.encode, record.parts))
        return ids, [(0, names.index(record.labels[0]))]

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

    def question(self, text: str, tokenizer: Tokenizer) -> Batch:
        """The batch of a text alone; of two, with the token that ends a text between them."""
        ids = tokenizer.encode(text, allowed_special="all")
        batch, lengths = self.inputs([framed(tokenizer, ids)], tokenizer)
        return batch | self.places(lengths)

    def answer(
        self, model: Transformer, tokenizer: Tokenizer, text: str, **options: object
    ) -> list[Iterator[str]]:
        """The likeliest labels of a text, or of two (see question)."""
        p = self.probabilities(model, self.question(text, tokenizer))[0]
        best = p.topk(min(SHOWN, len(p)))
        found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [iter(["  ".join(f"{self.labels[i]} {share:.1%}" for i, share in found)])]
