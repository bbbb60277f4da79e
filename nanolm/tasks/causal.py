"""The causal task: predict each next token of a text (Bengio et al. 2003).

Nothing needs a label, for the text is its own: the targets are the ids, one place further.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from nanolm.batches import Batch, check_ids, evaluation_batches, training_batch
from nanolm.evaluation import bits_per_byte
from nanolm.text.data import Dataset
from nanolm.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class CausalTask:
    """What is particular to next-token prediction, as a run asks for it."""

    vocab_size: int
    block_size: int
    batch_size: int
    seed: int  # of the order of the windows
    eval_iters: int = 0  # batches of an evaluation of a split; 0: all of val, as many of train

    @property
    def shape(self) -> dict[str, int]:
        """That of every batch."""
        return {"batch_size": self.batch_size, "block_size": self.block_size}

    def batch(self, dataset: Dataset, index: int) -> Batch:
        """Micro-batch number index of a run. Raises ValueError for ids outside the vocabulary."""
        return self.checked(training_batch(dataset.train, index, **self.shape, seed=self.seed))

    def evaluation(self, dataset: Dataset, split: str) -> Iterator[Batch]:
        """The batches on which a split, "train" or "val", is evaluated: each time the same."""
        whole = math.ceil((len(dataset.val) - 1) / self.block_size / self.batch_size)
        n = self.eval_iters or (whole if split == "train" else 0)
        for batch in evaluation_batches(getattr(dataset, split), **self.shape, n_batches=n):
            yield self.checked(batch)

    def checked(self, batch: Batch) -> Batch:
        """The batch, if the model has an embedding for each of its ids."""
        for ids in batch.values():
            check_ids(ids, self.vocab_size)
        return batch

    def score(self, val_loss: float, dataset: Dataset) -> dict[str, float]:
        """What the loss of the validation text means beside itself."""
        return {"bits_per_byte": bits_per_byte(val_loss, dataset.bytes_per_token)}

    def opening(self, tokenizer: Tokenizer) -> list[int]:
        """The tokens after which a model begins a text: a document's end, or that of a line."""
        if tokenizer.end_of_text is not None:
            return [tokenizer.end_of_text]
        try:
            return tokenizer.encode("\n")
        except ValueError:  # an alphabet without line ends
            return [0]
