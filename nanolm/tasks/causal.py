"""The causal task: predict each next token of a text (Bengio et al. 2003).

Nothing needs a label, for the text is its own: the targets are the ids, one place further.
"""

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from nanolm.batches import Batch, check_ids, evaluation_batches, training_batch
from nanolm.evaluation import bits_per_byte, loss_counts, mean_loss, perplexity
from nanolm.model import GPT, build_model
from nanolm.sampling import generate, rows_of
from nanolm.text.data import SPLITS, Dataset, write_dataset
from nanolm.text.tokenizer import Tokenizer, existing, stream_text


@dataclass(frozen=True, kw_only=True)
class CausalTask:
    """What is particular to next-token prediction."""

    vocab_size: int
    block_size: int
    batch_size: int
    seed: int  # of the order of the windows
    eval_iters: int = 0  # batches of an evaluation of a split; 0: all of val, as many of train
    begin_id: int | None = None  # the token after which a text begins; None: the usual one

    prepare = staticmethod(write_dataset)
    model = staticmethod(build_model)
    tally = staticmethod(loss_counts)
    continues: ClassVar[bool] = True  # whether an answer goes on with the text that it is given
    usual_samples: ClassVar[int] = 10  # answers, where nobody says how many
    usual_temperature: ClassVar[float] = 0.8  # and at which temperature they are drawn
    reads: ClassVar[str] = "causal"  # the task that its datasets are prepared for
    kinds: ClassVar[tuple[str, ...]] = ("a decoder",)  # of models that it trains
    asks: ClassVar[str] = ""  # what sample.py has to be told
    best_by: ClassVar[tuple[str, ...]] = ()  # scores by which a checkpoint may be the best

    @classmethod
    def fit(cls, dataset: Dataset) -> tuple[Dataset, dict[str, Any]]:
        """The dataset as the task sees it, and the keys of the model that it asks for."""
        keys = {"causal": cls.kinds == ("a decoder",), "head": "tokens"}
        keys["begin_id"] = opening(dataset.tokenizer, dataset.train)
        return dataset, keys | {"vocab_size": dataset.tokenizer.vocab_size}

    @property
    def shape(self) -> dict[str, int]:
        """That of every batch."""
        return {"batch_size": self.batch_size, "block_size": self.block_size}

    def batch(self, dataset: Dataset, index: int) -> Batch:
        """Micro-batch number index of a run. Raises ValueError for ids outside the vocabulary."""
        return self.checked(training_batch(dataset.train, index, **self.shape, seed=self.seed))

    def evaluation(self, dataset: Dataset, split: str) -> Iterator[Batch]:
        """The batches on which a split, "train" or "val", is evaluated: each time the same."""
        n = self.evaluation_size(dataset)
        for batch in evaluation_batches(getattr(dataset, split), **self.shape, n_batches=n):
            yield self.checked(batch)

    def evaluation_size(self, dataset: Dataset) -> int:
        """How many batches evaluation yields, at most."""
        windows = math.ceil((len(dataset.val) - 1) / self.block_size)
        return self.eval_iters or math.ceil(windows / self.batch_size)

    def checked(self, batch: Batch) -> Batch:
        """The batch, if the model has an embedding for each of its ids."""
        for ids in batch.values():
            check_ids(ids, self.vocab_size)
        return batch

    def score(self, counts: Tensor, dataset: Dataset) -> dict[str, float]:
        """The loss that tally's sums give, and what it means for this text."""
        loss = mean_loss(counts)
        bits = bits_per_byte(loss, dataset.bytes_per_token)
        return {"loss": loss, "perplexity": perplexity(loss), "bits_per_byte": bits}

    def n_tokens(self, batch: Batch) -> int:
        """How many tokens a batch holds."""
        return batch["ids"].size

    def matrix(self, counts: Tensor) -> None:
        """The confusion matrix of few labels; here there is none."""

    def baselines(self, dataset: Dataset) -> dict[str, float]:
        """Losses of models that have learned nothing, by what they do."""
        name = f"a blind guess, where a fresh model starts: ln({self.vocab_size})"
        return {name: math.log(self.vocab_size)}

    def batches_per_epoch(self, dataset: Dataset) -> float:
        """How many micro-batches hold as many tokens as there are for training."""
        return len(dataset.train) / (self.batch_size * self.block_size)

    def facts(self, dataset: Dataset) -> list[str]:
        """What a person should know of the data, in lines."""
        train, val = (f"{len(getattr(dataset, split)):,} tokens" for split in SPLITS)
        return [
            f"{train} for training, {val.removesuffix(' tokens')} for validation, "
            f"{self.vocab_size:,} in the vocabulary"
        ]

    def amount(self, n_batches: int) -> str:
        """What so many batches are."""
        return f"{n_batches * self.batch_size * self.block_size:,} tokens"

    def answer(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        text: str = "",
        *,
        n: int = 1,
        generator: torch.Generator | None = None,
        **options: float | None,
    ) -> list[Iterator[str]]:
        """n continuations of the text, drawn side by side, each as an iterator of pieces.

        Without a text, the model begins one. A continuation stops at the end of its document.
        options: those of generate.
        """
        begin = opening(tokenizer) if self.begin_id is None else self.begin_id
        ids = encode_prompt(tokenizer, text) if text else [begin]
        prompt = torch.tensor([ids], device=model.head.weight.device).expand(n, -1)
        rows = rows_of(generate(model, prompt, **options, generator=generator), n)
        end = tokenizer.end_of_text
        return [stream_text(tokenizer, takewhile(lambda i: i != end, row)) for row in rows]

    def show(
        self, model: GPT, dataset: Dataset, *, tokens: int, generator: torch.Generator
    ) -> tuple[str, Iterator[str]]:
        """How the model begins a document now; with characters, a line."""
        options = {"max_new_tokens": tokens, "temperature": 0.8, "generator": generator}
        [pieces] = self.answer(model, dataset.tokenizer, **options)
        return "the model writes", pieces


def opening(tokenizer: Tokenizer, text: np.ndarray | None = None) -> int:
    """The token after which a model begins a text.

    The one that stands before every text, a document's end, or that of a line: the first of these
    that is in the training text, if that is given. (A single document never shows its end, and a
    model has learned nothing of it.) Where there is none of them, the first token.
    """
    usual = existing(tokenizer.begin_of_text, tokenizer.end_of_text)
    with suppress(ValueError):  # an alphabet without line ends
        usual += tokenizer.encode("\n")[:1]
    first = 0 if text is None else int(text[0])
    return next((token for token in usual if text is None or shows(text, token)), first)


def shows(text: np.ndarray, token: int) -> bool:
    """Whether a token is in a text, of which no more is read than needed."""
    return any((text[i : i + 10**6] == token).any() for i in range(0, len(text), 10**6))


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text to continue, in which special tokens mean themselves.

    The token that stands before every text, as Llama 3's do, is put before it where it is missing.
    """
    ids, begin = tokenizer.encode(text, allowed_special="all"), tokenizer.begin_of_text
    return ids if begin is None or ids[:1] == [begin] else [begin, *ids]
