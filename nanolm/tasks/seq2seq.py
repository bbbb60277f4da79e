"""The task of sequence to sequence: an encoder reads a text, a decoder writes its answer.

Sutskever et al. 2014; with attention Bahdanau et al. 2015, and nothing else Vaswani et al. 2017.
Batches have about one number of tokens, as there: many short texts, or a few long ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from nanolm.batches import Batch, epoch_groups, token_groups
from nanolm.loss import NO_TARGET
from nanolm.model import EncoderDecoder
from nanolm.tasks.answering import AnsweringTask
from nanolm.tasks.examples import filled
from nanolm.text.conversations import BORDER
from nanolm.text.data import Dataset
from nanolm.text.examples import Examples
from nanolm.text.tokenizer import Tokenizer, existing


@dataclass(frozen=True, kw_only=True)
class Seq2SeqTask(AnsweringTask):
    """What is particular to answers of an encoder-decoder."""

    start_id: int  # the token before the first of an answer
    batch_tokens: int = 0  # of a batch, about; 0: batch_size examples

    kinds: ClassVar[tuple[str, ...]] = ("an encoder-decoder",)

    @classmethod
    def fit(cls, dataset: Dataset) -> tuple[Dataset, dict[str, Any]]:
        """The dataset, and the keys of the model that it asks for."""
        dataset, keys = super().fit(dataset)
        return dataset, keys | {"start_id": dataset.tokenizer.end_of_text or 0}

    def lengths(self, examples: Examples) -> np.ndarray:
        """How long sources and answers are: (n, 2)."""
        begins, ends = examples.labels[examples.starts[1:, 1] - 1].T  # of the last span of each
        return np.stack((begins - self.border + 1, ends - begins), axis=1)  # sources have an end

    @property
    def border(self) -> int:
        """How many tokens before an answer belong neither to it nor to its source."""
        return 0 if self.chat else len(self.tokenizer.encode(BORDER))

    def too_long(self, examples: Examples) -> np.ndarray:
        """Which examples are longer than the context: (n,) booleans. They are left out."""
        return (self.lengths(examples) > self.block_size).any(axis=1)

    def groups(self, examples: Examples, epoch: int) -> list[np.ndarray]:
        """The batches of an epoch, as numbers of examples."""
        numbers, options = self.fitting(examples), {"seed": self.seed, "epoch": epoch}
        lengths = self.lengths(examples)[numbers]
        if self.batch_tokens:
            groups = token_groups(lengths, batch_tokens=self.batch_tokens, **options)
        else:
            groups = epoch_groups(lengths.sum(axis=1), batch_size=self.batch_size, **options)
        return [numbers[group] for group in groups]

    def gather(self, examples: Examples, group: Sequence[int]) -> Batch:
        """Examples as a batch: "source" and its mask (B, S), "ids" and "targets" (B, T)."""
        sources, answers, end = [], [], existing(self.tokenizer.end_of_text)
        for number in group:
            ids, spans = examples[number]
            begin, last = spans[-1]
            sources.append([*ids[: begin - self.border].tolist(), *end])
            answers.append(ids[begin:last].tolist())
        source = filled(sources, NO_TARGET, self.block_size)
        beginnings = [[self.start_id, *answer[:-1]] for answer in answers]
        return self.checked(
            {
                "source": np.maximum(source, 0),
                "source_mask": source != NO_TARGET,
                "ids": filled(beginnings, 0, self.block_size),
                "targets": filled(answers, NO_TARGET, self.block_size),
            }
        )

    def questions(self, examples: Examples, numbers: Sequence[int]) -> Batch:
        """What begin takes, and the right answers as targets, (B, A)."""
        batch = self.gather(examples, numbers)
        asked = np.where(batch["source_mask"], batch["source"], NO_TARGET)
        return {"asked": asked, "targets": batch["targets"]}

    def n_tokens(self, batch: Batch) -> int:
        """How many tokens a batch holds, without what fills up its rows."""
        return int(batch["source_mask"].sum() + (batch["targets"] != NO_TARGET).sum())

    def question(self, text: str, tokenizer: Tokenizer) -> list[int]:
        """The ids of a source, as it stands in training."""
        return super().question(text, tokenizer) + existing(tokenizer.end_of_text)

    @staticmethod
    @torch.no_grad()
    def begin(model: EncoderDecoder, asked: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What generate takes for sources: the token before an answer, and what is looked at."""
        mask = asked != NO_TARGET
        memory = model.encode(asked.clamp(min=0), mask)
        start = torch.full((len(asked), 1), model.config.start_id, device=asked.device)
        return start, {"memory": memory, "source_mask": mask}

    def amount(self, n_batches: int) -> str:
        """What so many batches are."""
        if self.batch_tokens:
            return f"about {n_batches * self.batch_tokens:,} tokens"
        return f"{n_batches * self.batch_size:,} examples"
