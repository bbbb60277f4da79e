"""The task of completion: a decoder goes on from a text to its answer (Radford et al. 2018).

Prompt and completion, or the turns of a conversation, stand behind each other as one text, and the
loss is that of the answers alone. Short examples share a row, where they do not see each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from nanolm.batches import Batch, epoch_groups, packed_rows
from nanolm.loss import NO_TARGET
from nanolm.model import GPT
from nanolm.tasks.answering import AnsweringTask
from nanolm.tasks.examples import filled
from nanolm.text.conversations import BORDER
from nanolm.text.data import Dataset
from nanolm.text.examples import Examples
from nanolm.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class CompletionTask(AnsweringTask):
    """What is particular to answers that continue a prompt."""

    pack: bool = True  # several examples in a row

    kinds: ClassVar[tuple[str, ...]] = ("a decoder",)

    @property
    def asks(self) -> str:
        """What sample.py has to be told."""
        return " --chat" if self.chat else super().asks

    def too_long(self, examples: Examples) -> np.ndarray:
        """Which examples are longer than the context: (n,) booleans. They are left out."""
        return examples.lengths - 1 > self.block_size

    def groups(self, examples: Examples, epoch: int) -> list[list[list[int]]]:
        """The batches of an epoch: rows of examples, as their numbers."""
        numbers = self.fitting(examples)
        lengths, options = examples.lengths[numbers] - 1, {"seed": self.seed}
        if not self.pack:
            options |= {"batch_size": self.batch_size, "epoch": epoch}
            groups = epoch_groups(lengths, **options)
            return [[[i] for i in numbers[group].tolist()] for group in groups]
        rows = packed_rows(lengths, block_size=self.block_size, **options)
        order = np.random.default_rng((self.seed, epoch)).permutation(len(rows))
        rows = [numbers[rows[i]].tolist() for i in order]
        return [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]

    def gather(self, examples: Examples, group: list[list[int]]) -> Batch:
        """Rows as a batch: "ids", "targets" and "segments", (B, T) each; segment 0 fills up."""
        ids, targets, segments = [], [], []
        for row in group:
            for part in (ids, targets, segments):
                part.append([])
            for segment, number in enumerate(row, start=1):
                own, wanted = learned(*examples[number])
                ids[-1] += own[:-1].tolist()
                targets[-1] += wanted[1:].tolist()
                segments[-1] += [segment] * (len(own) - 1)
        arrays = {"ids": (ids, 0), "targets": (targets, NO_TARGET), "segments": (segments, 0)}
        return self.checked(
            {name: filled(rows, fill, self.block_size) for name, (rows, fill) in arrays.items()}
        )

    def n_tokens(self, batch: Batch) -> int:
        """How many tokens a batch holds, without what fills up its rows."""
        return int((batch["segments"] > 0).sum())

    def question(self, text: str, tokenizer: Tokenizer) -> list[int]:
        """The ids of a text that is to be answered, as it stands in training."""
        border = [] if self.chat else tokenizer.encode(BORDER)
        return super().question(text, tokenizer) + border

    @staticmethod
    def begin(model: GPT, asked: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What generate takes for texts: their ids, filled up at the left."""
        own = asked != NO_TARGET
        order = own.long().argsort(dim=1, stable=True)[:, -int(own.sum(dim=1).max()) :]
        context = {} if own.gather(1, order).all() else {"segments": own.gather(1, order).long()}
        return asked.gather(1, order).clamp(min=0), context

    def facts(self, dataset: Dataset) -> list[str]:
        """What a person should know of the data, in lines."""
        lengths = dataset.train.lengths[self.fitting(dataset.train)] - 1
        wanted = sum(end - begin for begin, end in dataset.train.labels.tolist())
        rows = packed_rows(lengths, block_size=self.block_size, seed=self.seed)
        empty = 1 - lengths.sum() / (len(rows) * self.block_size)
        packed = f"packed into {len(rows):,} rows of {self.block_size} tokens, {empty:.1%} empty"
        share = f"{wanted / dataset.train.lengths.sum():.0%} of the tokens are to be learned"
        return [*super().facts(dataset), *([packed] if self.pack else []), share]

    def amount(self, n_batches: int) -> str:
        """What so many batches are."""
        return f"{n_batches * self.batch_size:,} {'rows' if self.pack else 'examples'}"


def learned(ids: np.ndarray, spans: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """The ids of an example, and those that are to be learned, NO_TARGET for the others."""
    wanted = np.full(len(ids), NO_TARGET)
    for begin, end in spans:
        wanted[begin:end] = ids[begin:end]
    return ids, wanted
