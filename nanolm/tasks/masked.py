"""The masked task: guess tokens that are hidden, from both sides (Devlin et al. 2019, 3.1).

Of each window some tokens are chosen. Most of them are replaced by the mask token; but a model
that is finetuned on whole texts never sees it again, so some are replaced by any other token and
some are left as they are, and the model has to doubt every token that it sees. The loss is that of
the chosen tokens alone, so the head need not look at the others.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanolm.batches import Batch, evaluation_batches, training_batch
from nanolm.evaluation import accuracy_counts, mean_loss, perplexity
from nanolm.loss import NO_TARGET
from nanolm.model import Encoder
from nanolm.tasks.causal import CausalTask
from nanolm.text.data import Dataset
from nanolm.text.tokenizer import Tokenizer, mask_of, with_mask

MASKED, RANDOM = 0.8, 0.1  # shares of the chosen tokens that are masked, and exchanged
SHOWN = 5  # guesses for each mask


@dataclass(frozen=True, kw_only=True)
class MaskedTask(CausalTask):
    """What is particular to masked language modelling; the windows are the causal task's."""

    mask_fraction: float = 0.15  # of the tokens of a window: the chosen ones

    tally = staticmethod(accuracy_counts)
    kinds = ("an encoder",)
    continues = False
    asks = ' --start="A text with <|mask|> in it"'
    usual_samples = 1
    best_by = ("accuracy",)

    @classmethod
    def fit(cls, dataset: Dataset) -> tuple[Dataset, dict[str, Any]]:
        """The dataset with a token for the mask, and the keys of the model that it asks for."""
        return super().fit(replace(dataset, tokenizer=with_mask(dataset.tokenizer)))

    def batch(self, dataset: Dataset, index: int) -> Batch:
        """Micro-batch number index of a run: "ids" (B, T), and "places" and "targets" (B, P)."""
        ids = training_batch(dataset.train, index, **self.shape, seed=self.seed)["ids"]
        random = np.random.default_rng((self.seed, index, 1))
        return self.hide(ids, np.ones(ids.shape, bool), dataset.tokenizer, random)

    def evaluation(self, dataset: Dataset, split: str) -> Iterator[Batch]:
        """The batches on which a split is evaluated: the same tokens are hidden each time."""
        n = self.evaluation_size(dataset)
        batches = evaluation_batches(getattr(dataset, split), **self.shape, n_batches=n)
        for index, batch in enumerate(batches):
            real = batch["targets"] != NO_TARGET
            rows = real.any(axis=1)
            random = np.random.default_rng((self.seed, index, 2))
            hidden = self.hide(batch["ids"][rows], real[rows], dataset.tokenizer, random)
            yield hidden if real[rows].all() else hidden | {"mask": real[rows]}

    def hide(
        self, ids: np.ndarray, real: np.ndarray, tokenizer: Tokenizer, random: np.random.Generator
    ) -> Batch:
        """Choose tokens of each row and hide them. real: which of them are no padding."""
        ids = self.checked({"ids": ids})["ids"].copy()
        n = np.maximum(1, np.rint(self.mask_fraction * real.sum(axis=1)).astype(int))
        order = np.where(real, random.random(ids.shape), 2.0)  # padding comes last
        places = order.argsort(axis=1)[:, : n.max()]
        tokens = np.take_along_axis(ids, places, axis=1)
        chosen = np.arange(n.max()) < n[:, None]
        draws = random.random(places.shape)
        hidden = np.where(draws < MASKED, mask_of(tokenizer), tokens)
        exchanged = (draws >= MASKED) & (draws < MASKED + RANDOM)
        hidden[exchanged] = random.integers(self.vocab_size, size=exchanged.sum())
        np.put_along_axis(ids, places, np.where(chosen, hidden, tokens), axis=1)
        return {"ids": ids, "places": places, "targets": np.where(chosen, tokens, NO_TARGET)}

    def score(self, counts: Tensor, dataset: Dataset) -> dict[str, float]:
        """The loss, the share of right guesses, and exp of the loss (Salazar et al. 2020)."""
        loss, (_, n, hits) = mean_loss(counts), counts.tolist()
        return {"loss": loss, "accuracy": hits / n, "pseudo_perplexity": perplexity(loss)}

    @staticmethod
    def answer(
        model: Encoder, tokenizer: Tokenizer, text: str, **options: object
    ) -> list[Iterator[str]]:
        """One text: a line for each mask in the given one, with the likeliest tokens there.

        Raises ValueError where there is no mask.
        """
        ids, mask = framed_text(tokenizer, text), mask_of(tokenizer)
        places = [place for place, token in enumerate(ids) if token == mask]
        if not places:
            name = tokenizer.decode([mask])
            raise ValueError(f"start={text!r}: write {name} where the model is to fill in a token")
        tensors = (torch.tensor([row], device=model.head.weight.device) for row in (ids, places))
        with torch.no_grad():
            logits, _ = model.eval()(next(tensors), places=next(tensors))
        best = logits[0].float().softmax(dim=-1).topk(min(SHOWN, logits.shape[-1]))
        lines = [
            "  ".join(f"{tokenizer.decode([i])!r} {p:.1%}" for p, i in zip(*row, strict=True))
            for row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        return [iter(["\n".join(lines)])]

    def show(
        self, model: Encoder, dataset: Dataset, **options: object
    ) -> tuple[str, Iterator[str]]:
        """A text of the validation split, and guesses for what is hidden in it."""
        tokenizer, batch = dataset.tokenizer, next(self.evaluation(dataset, "val"))
        ids = batch["ids"][0, : self.block_size // 4].tolist()  # room for an odd text's tokens
        text = tokenizer.decode([*ids, mask_of(tokenizer)])
        [answer] = self.answer(model, tokenizer, text)
        return "the model fills in", chain([text, "\n"], answer)


def framed_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text in which special tokens mean themselves, framed where that is usual."""
    ids, begin = tokenizer.encode(text, allowed_special="all"), tokenizer.begin_of_text
    return ids if begin is None else [begin, *ids, tokenizer.end_of_text]
