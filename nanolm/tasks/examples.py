"""What tasks share whose data are examples, each of a length of its own, and no windows of a text.

An epoch has each of them once, in batches that are made anew; how they are grouped and laid out is
the task's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from nanolm.batches import Batch
from nanolm.model import build_model
from nanolm.text.data import SPLITS, Dataset, new_dataset, write_array
from nanolm.text.examples import DTYPE, Examples, packed
from nanolm.text.records import Record
from nanolm.text.tokenizer import Tokenizer

MULTIPLE = 8  # of lengths of batches, for fewer shapes


@dataclass(frozen=True, kw_only=True)
class ExampleTask:
    """What all of them share."""

    vocab_size: int
    block_size: int
    batch_size: int
    seed: int  # of the order of the examples
    eval_iters: int = 0  # batches of an evaluation of a split; 0: all of val, as many of train
    tokenizer: Tokenizer | None = field(default=None, compare=False, repr=False)

    model = staticmethod(build_model)
    continues: ClassVar[bool] = False
    asks: ClassVar[str] = ' --start="A text"'
    usual_samples: ClassVar[int] = 1
    usual_temperature: ClassVar[float] = 0.0

    @classmethod
    def prepare(
        cls,
        folder: Path,
        train: Sequence[Record],
        val: Sequence[Record],
        tokenizer: Tokenizer,
        *,
        source: str = "",
        made_with: Mapping[str, Any] = {},
    ) -> None:
        """Encode records into a dataset folder, whole or not at all.

        source: where they come from, in words. made_with: what was asked for.
        """
        tokenizer, own = cls.particulars(train, val, tokenizer)
        facts = {"task": cls.reads, "made_with": made_with, "source": source, **own}
        encoded = [
            [in_place(cls.encode, r, tokenizer, own["labels"]) for r in part]
            for part in (train, val)
        ]
        with new_dataset(folder, tokenizer, DTYPE, **facts) as (meta, *files):
            splits = zip(SPLITS, encoded, (train, val), files, strict=True)
            for split, examples, records, file in splits:
                write_array(packed(examples), file)
                meta[split] = {
                    "examples": len(examples),
                    "labels": sum(len(labels) for _, labels in examples),
                    "tokens": sum(len(ids) for ids, _ in examples),
                    "bytes": sum(len(part.encode()) for r in records for part in r.parts),
                }

    @classmethod
    def particulars(
        cls, train: Sequence[Record], val: Sequence[Record], tokenizer: Tokenizer
    ) -> tuple[Tokenizer, dict[str, Any]]:
        """The tokenizer that the records need, and what else meta.json says."""
        raise NotImplementedError

    @staticmethod
    def encode(
        record: Record, tokenizer: Tokenizer, names: Sequence[str]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a record, and pairs of numbers that say what is asked of it."""
        raise NotImplementedError

    def groups(self, examples: Examples, epoch: int) -> Sequence[Any]:
        """The batches of an epoch, in the form that gather takes; equally many in each."""
        raise NotImplementedError

    def gather(self, examples: Examples, group: Any) -> Batch:
        """A batch."""
        raise NotImplementedError

    def batch(self, dataset: Dataset, index: int) -> Batch:
        """Micro-batch number index of a run: each example comes once in an epoch."""
        epoch, number = divmod(index, self.batches_per_epoch(dataset))
        return self.gather(dataset.train, grouped(self, dataset.train, epoch)[number])

    def evaluation(self, dataset: Dataset, split: str) -> Iterator[Batch]:
        """The batches on which a split is evaluated: each time the same."""
        examples = getattr(dataset, split)
        for group in islice(grouped(self, examples, 0), self.evaluation_size(dataset)):
            yield self.gather(examples, group)

    def evaluation_size(self, dataset: Dataset) -> int:
        """How many batches evaluation yields, at most."""
        return self.eval_iters or len(grouped(self, dataset.val, 0))

    def batches_per_epoch(self, dataset: Dataset) -> int:
        return len(grouped(self, dataset.train, 0))


def in_place(encode: Callable, record: Record, *words: Any) -> Any:
    """What encode makes of a record. Raises ValueError, with its place, where that fails."""
    try:
        return encode(record, *words)
    except ValueError as error:
        raise ValueError(f"{record.where}: {error}" if record.where else str(error)) from None


@lru_cache(maxsize=4)  # those of training and of evaluations
def grouped(task: ExampleTask, examples: Examples, epoch: int) -> Sequence[Any]:
    """task.groups, remembered."""
    return task.groups(examples, epoch)


def filled(rows: Sequence[Sequence[int]], fill: int, limit: int) -> np.ndarray:
    """Rows of different lengths as an array, with fill behind the shorter ones.

    Its width is a multiple of MULTIPLE, or limit.
    """
    T = max(1, max(map(len, rows)))
    found = np.full((len(rows), min(limit, -(-T // MULTIPLE) * MULTIPLE)), fill, np.int64)
    for row, own in zip(found, rows, strict=True):
        row[: len(own)] = own
    return found
