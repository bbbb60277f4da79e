"""What classification and tagging share: examples with labels, padded batches, counts of guesses.

Texts differ in length, so a batch is filled up to its longest text, and a mask says what is real.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from nanolm.batches import Batch, check_ids, epoch_groups
from nanolm.evaluation import mean_loss
from nanolm.layers import ModelConfig
from nanolm.loss import NO_TARGET, cross_entropy
from nanolm.model import Transformer, build_model
from nanolm.tasks import scores
from nanolm.text.data import SPLITS, Dataset, new_dataset
from nanolm.text.examples import DTYPE, Examples, label_names, packed
from nanolm.text.records import Record
from nanolm.text.tokenizer import Tokenizer

SHOWN, SHOWN_TOKENS = 3, 24  # texts of the validation split that show what the model does
MULTIPLE = 8  # of lengths of batches, for fewer shapes


@dataclass(frozen=True, kw_only=True)
class LabelledTask:
    """What classification and tagging share."""

    vocab_size: int
    block_size: int
    batch_size: int
    seed: int  # of the order of the examples
    causal: bool
    norm_first: bool
    n_types: int
    labels: tuple[str, ...] = ()
    eval_iters: int = 0  # batches of an evaluation of a split; 0: all of val, as many of train

    model = staticmethod(build_model)
    trains_causal: ClassVar[bool | None] = None  # decoders and encoders
    continues: ClassVar[bool] = False

    # --------------------------------------------------------------------------------------
    # Data

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
        names = label_names(train, val)
        facts = {"task": cls.reads, "made_with": made_with, "source": source, "labels": names}
        facts["baselines"] = usual_scores(train, val, names, unit=cls.unit)
        with new_dataset(folder, tokenizer, DTYPE, **facts) as (meta, *files):
            for split, records, file in zip(SPLITS, (train, val), files, strict=True):
                examples = [cls.encode(record, tokenizer, names) for record in records]
                packed(examples).tofile(file)
                meta[split] = {
                    "examples": len(examples),
                    "labels": sum(len(labels) for _, labels in examples),
                    "tokens": sum(len(ids) for ids, _ in examples),
                    "bytes": sum(len(part.encode()) for r in records for part in r.parts),
                }

    @classmethod
    def fit(cls, dataset: Dataset) -> tuple[Dataset, dict[str, Any]]:
        """The dataset, and the keys of the model that it asks for."""
        labels = tuple(dataset.meta["labels"])
        keys = {"vocab_size": dataset.tokenizer.vocab_size, "head": cls.head, "labels": labels}
        return dataset, keys

    def batch(self, dataset: Dataset, index: int) -> Batch:
        """Micro-batch number index of a run: each example comes once in an epoch."""
        epoch, number = divmod(index, self.batches_per_epoch(dataset))
        groups = epoch_of(dataset.train, self.batch_size, self.seed, epoch)
        return self.padded(dataset.train, groups[number], dataset.tokenizer)

    def evaluation(self, dataset: Dataset, split: str) -> Iterator[Batch]:
        """The batches on which a split is evaluated: each time the same."""
        examples = getattr(dataset, split)
        groups = epoch_of(examples, self.batch_size, self.seed, 0)
        for numbers in islice(groups, self.evaluation_size(dataset)):
            yield self.padded(examples, numbers, dataset.tokenizer)

    def evaluation_size(self, dataset: Dataset) -> int:
        """How many batches evaluation yields, at most."""
        return self.eval_iters or math.ceil(len(dataset.val) / self.batch_size)

    def batches_per_epoch(self, dataset: Dataset) -> int:
        return math.ceil(len(dataset.train) / self.batch_size)

    def padded(self, examples: Examples, numbers: np.ndarray, tokenizer: Tokenizer) -> Batch:
        """Those examples as one batch."""
        rows, pairs = zip(*(examples[i] for i in numbers), strict=True)
        batch, lengths = self.inputs(rows, tokenizer)
        return batch | self.targets(pairs, lengths)

    def inputs(
        self, rows: Sequence[Sequence[int]], tokenizer: Tokenizer
    ) -> tuple[Batch, np.ndarray]:
        """Texts, cut to block_size and filled up to the longest; and how long each is."""
        lengths = np.array([min(len(row), self.block_size) for row in rows])
        T = min(self.block_size, MULTIPLE * math.ceil(lengths.max() / MULTIPLE))
        ids = np.zeros((len(rows), T), np.int64)
        for row, own, n in zip(ids, rows, lengths, strict=True):
            row[:n] = own[:n]
            row[n - 1] = own[-1]  # also of a text that is cut: what ends it
        check_ids(ids, self.vocab_size)
        batch = {"ids": ids, "mask": np.arange(T) < lengths[:, None]}
        if self.causal:
            del batch["mask"]  # what fills up comes last, and nothing looks ahead
        if self.n_types:
            ends = (ids == tokenizer.end_of_text) & (np.arange(T) < lengths[:, None] - 1)
            batch["types"] = np.minimum(ends.cumsum(axis=1) - ends, self.n_types - 1)
        return batch, lengths

    @classmethod
    def of(cls, config: ModelConfig) -> "LabelledTask":
        """The task that a model was trained for, for single texts."""
        keys = {field.name: getattr(config, field.name, 1) for field in fields(cls)}
        return cls(**keys)

    @staticmethod
    @torch.no_grad()
    def probabilities(model: Transformer, batch: Batch) -> Tensor:
        """Those of the labels at each place of one text: (P, labels)."""
        device = model.head.weight.device
        logits, _ = model.eval()(**{k: torch.from_numpy(a).to(device) for k, a in batch.items()})
        return logits[0].float().softmax(dim=-1)

    # --------------------------------------------------------------------------------------
    # Scores

    def tally(self, model: Transformer, batch: dict[str, Tensor]) -> Tensor:
        """The sum of the losses, the number of targets, the confusion matrix, and own_counts."""
        targets = batch["targets"]
        logits, _ = model(**{name: array for name, array in batch.items() if name != "targets"})
        n = (targets != NO_TARGET).sum()
        losses = torch.stack((cross_entropy(logits, targets) * n, n)).cpu().double()
        wanted, found = targets.cpu().numpy(), logits.argmax(dim=-1).cpu().numpy()
        kept = wanted != NO_TARGET
        matrix = scores.confusion(wanted[kept], found[kept], len(self.labels))
        counts = np.concatenate((matrix.ravel(), self.own_counts(wanted, found)))
        return torch.cat((losses, torch.from_numpy(counts).double()))

    def own_counts(self, targets: np.ndarray, guesses: np.ndarray) -> np.ndarray:
        """What else the task counts in a batch."""
        return np.zeros(0)

    def matrix(self, counts: Tensor) -> np.ndarray:
        """The confusion matrix in the sums of tally."""
        n = len(self.labels)
        return counts[2 : 2 + n * n].reshape(n, n).numpy()

    def score(self, counts: Tensor, dataset: Dataset) -> dict[str, float]:
        """The loss, and the scores of all labels and of each."""
        matrix = self.matrix(counts)
        named = {"accuracy": scores.accuracy(matrix), "macro_f1": scores.macro_f1(matrix)}
        f1 = scores.label_scores(matrix)[2].tolist()
        each = {f"f1/{name}": value for name, value in zip(self.labels, f1, strict=True)}
        return {"loss": mean_loss(counts), **named, **self.own_scores(counts), **each}

    def own_scores(self, counts: Tensor) -> dict[str, float]:
        """What else the task scores."""
        return {}

    def baselines(self, dataset: Dataset) -> dict[str, float]:
        """What models score that have learned nothing, by what they do."""
        n = len(self.labels)
        return {f"loss of a blind guess, ln({n})": math.log(n), **dataset.meta["baselines"]}

    # --------------------------------------------------------------------------------------
    # Answers

    def facts(self, dataset: Dataset) -> list[str]:
        """What a person should know of the data, in lines."""
        sizes = [f"{len(getattr(dataset, split)):,}" for split in SPLITS]
        long = sum(int((getattr(dataset, s).lengths > self.block_size).sum()) for s in SPLITS)
        cut = f"{long:,} of them are longer than {self.block_size} tokens, and cut"
        names = ", ".join(self.labels[:12]) + (" ..." if len(self.labels) > 12 else "")
        return [
            f"{sizes[0]} texts for training, {sizes[1]} for validation",
            *([cut] if long else []),
            f"{len(self.labels)} labels: {names}",
        ]

    def amount(self, n_batches: int) -> str:
        """What so many batches are."""
        return f"{n_batches * self.batch_size:,} texts"

    def show(
        self, model: Transformer, dataset: Dataset, **options: object
    ) -> tuple[str, Iterator[str]]:
        """Texts of the validation split, labelled by the model."""
        tokenizer, lines = dataset.tokenizer, []
        special = set(tokenizer.special_tokens.values())
        for i in range(min(SHOWN, len(dataset.val))):
            ids = [i for i in dataset.val[i][0][:SHOWN_TOKENS].tolist() if i not in special]
            [answer] = self.answer(model, tokenizer, tokenizer.decode(ids))
            lines += [" ".join(tokenizer.decode(ids).split()), "".join(answer)]
        return "the model labels", iter(["\n".join(lines)])


@lru_cache(maxsize=4)  # those of training and of evaluations
def epoch_of(examples: Examples, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The batches of an epoch, as numbers of examples."""
    return epoch_groups(examples.lengths, batch_size=batch_size, seed=seed, epoch=epoch)


def usual_scores(
    train: Sequence[Record], val: Sequence[Record], names: Sequence[str], *, unit: str | None
) -> dict[str, float]:
    """Scores on val of guesses without a model: the label that each unit mostly has in training.

    For a unit that is new, and for all of them, that is the most frequent label.
    """
    counts = defaultdict(Counter)
    for part, label in labelled_parts(train):
        counts[part][label] += 1
        counts[None][label] += 1
    usual = {part: names.index(found.most_common(1)[0][0]) for part, found in counts.items()}
    pairs, found = list(labelled_parts(val)), {}
    wanted = np.array([names.index(label) for _, label in pairs], int)
    known_by = {repr(names[usual[None]]): {}}
    if unit:
        known_by[f"the usual label of each {unit}"] = usual
    for how, known in known_by.items():
        guesses = np.array([known.get(part, usual[None]) for part, _ in pairs], int)
        matrix = scores.confusion(wanted, guesses, len(names))
        found[f"accuracy of {how}"] = scores.accuracy(matrix)
        found[f"macro F1 of {how}"] = scores.macro_f1(matrix)
    return found


def labelled_parts(records: Iterable[Record]) -> Iterator[tuple[str, str]]:
    """The words, or the texts, that have a label, with it."""
    for record in records:
        for part, label in zip(record.parts, record.labels, strict=False):
            if label is not None:
                yield part, label
