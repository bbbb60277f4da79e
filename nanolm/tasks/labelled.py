"""What classification and tagging share: examples with labels, padded batches, counts of guesses.

Texts differ in length, so a batch is filled up to its longest text, and a mask says what is real.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from nanolm.batches import Batch, check_ids, epoch_groups
from nanolm.evaluation import mean_loss
from nanolm.loss import NO_TARGET, cross_entropy
from nanolm.model import Transformer
from nanolm.tasks import scores
from nanolm.tasks.examples import MULTIPLE, ExampleTask
from nanolm.text.data import SPLITS, Dataset
from nanolm.text.examples import Examples, label_names
from nanolm.text.records import Record
from nanolm.text.tokenizer import Tokenizer

SHOWN, SHOWN_TOKENS = 3, 24  # texts of the validation split that show what the model does


@dataclass(frozen=True, kw_only=True)
class LabelledTask(ExampleTask):
    """What classification and tagging share."""

    causal: bool
    norm_first: bool
    n_types: int
    labels: tuple[str, ...] = ()

    kinds: ClassVar[tuple[str, ...]] = ("a decoder", "an encoder")

    # --------------------------------------------------------------------------------------
    # Data

    @classmethod
    def particulars(
        cls, train: Sequence[Record], val: Sequence[Record], tokenizer: Tokenizer
    ) -> tuple[Tokenizer, dict[str, Any]]:
        """The tokenizer as it is, the labels, and what guesses score."""
        names = label_names(train, val)
        baselines = usual_scores(train, val, names, unit=cls.unit)
        return tokenizer, {"labels": names, "baselines": baselines}

    @classmethod
    def fit(cls, dataset: Dataset) -> tuple[Dataset, dict[str, Any]]:
        """The dataset, and the keys of the model that it asks for."""
        labels = tuple(dataset.meta["labels"])
        keys = {"vocab_size": dataset.tokenizer.vocab_size, "head": cls.head, "labels": labels}
        return dataset, keys

    def groups(self, examples: Examples, epoch: int) -> list[np.ndarray]:
        """The batches of an epoch, as numbers of examples."""
        options = {"batch_size": self.batch_size, "seed": self.seed, "epoch": epoch}
        return epoch_groups(examples.lengths, **options)

    def gather(self, examples: Examples, group: Sequence[int]) -> Batch:
        """Those examples as one batch."""
        rows, pairs = zip(*(examples[i] for i in group), strict=True)
        batch, lengths = self.inputs(rows, self.tokenizer)
        return batch | self.targets(pairs, lengths)

    def n_tokens(self, batch: Batch) -> int:
        """How many tokens a batch holds, without what fills up its rows."""
        return int(batch["mask"].sum()) if "mask" in batch else batch["ids"].size

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
            whole = dataset.val[i][0].tolist()
            ids = [i for i in whole[:SHOWN_TOKENS] if i not in special]
            [answer] = self.answer(model, tokenizer, tokenizer.decode(ids))
            text, rest = " ".join(tokenizer.decode(ids).split()), whole[SHOWN_TOKENS:]
            lines += [text + " ..." * bool(rest), "".join(answer)]
        return "the model labels", iter(["\n".join(lines)])


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
