"""What completion and seq2seq share: examples of a text and its answer, and scores of answers.

At each evaluation the model answers some texts of the validation split, greedily, and its answers
are compared with the given ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from nanolm.batches import Batch, check_ids
from nanolm.evaluation import loss_counts, mean_loss, perplexity
from nanolm.loss import NO_TARGET
from nanolm.model import GPT
from nanolm.sampling import beam_search, generate, rows_of
from nanolm.tasks.examples import ExampleTask, filled
from nanolm.tasks.scores import TEXT_SCORES, text_counts, text_scores
from nanolm.text.conversations import (
    ENDS,
    PAIR,
    USER,
    answer_opening,
    can_chat,
    chatml,
    exchange_ids,
    prompt_ids,
    with_answers,
)
from nanolm.text.data import SPLITS, Dataset
from nanolm.text.examples import Examples
from nanolm.text.records import Record
from nanolm.text.tokenizer import Tokenizer, existing, stream_text

COUNTED = 1000  # texts of the validation split, at most, that give the baselines
SHOWN = 3  # texts of the validation split that show what the model does
WIDTH = 300  # characters of them
N_COUNTS = len(text_counts("", ""))


@dataclass(frozen=True, kw_only=True)
class AnsweringTask(ExampleTask):
    """What completion and seq2seq share."""

    eval_answers: int = 0  # texts that are answered at each evaluation
    chat: bool = False  # whether they are conversations

    reads: ClassVar[str] = "completion"
    best_by: ClassVar[tuple[str, ...]] = TEXT_SCORES

    # --------------------------------------------------------------------------------------
    # Data

    @classmethod
    def particulars(
        cls, train: Sequence[Record], val: Sequence[Record], tokenizer: Tokenizer
    ) -> tuple[Tokenizer, dict[str, Any]]:
        """A tokenizer with what ends an answer; whether this is chats; what repetition scores."""
        chat = train[0].labels != PAIR
        baselines = {} if chat else repeated_scores(val[:COUNTED])
        facts = {"labels": [], "chat": chat, "baselines": baselines}
        return with_answers(tokenizer, chat=chat), facts

    @staticmethod
    def encode(
        record: Record, tokenizer: Tokenizer, names: Sequence[str]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a record, and the spans of what is to be learned (see exchange_ids)."""
        return exchange_ids(record, tokenizer)

    @classmethod
    def fit(cls, dataset: Dataset) -> tuple[Dataset, dict[str, Any]]:
        """The dataset, and the keys of the model that it asks for."""
        keys = {"causal": True, "head": "tokens", "chat": dataset.meta["chat"]}
        return dataset, keys | {"vocab_size": dataset.tokenizer.vocab_size}

    def too_long(self, examples: Examples) -> np.ndarray:
        """Which examples are longer than the context: (n,) booleans. They are left out."""
        raise NotImplementedError

    def fitting(self, examples: Examples) -> np.ndarray:
        """The numbers of the examples that are used. Raises ValueError where there is none."""
        numbers = np.flatnonzero(~self.too_long(examples))
        if not len(numbers):
            raise ValueError(
                f"block_size={self.block_size}: all {len(examples)} examples of a split are "
                f"longer; choose a larger one, as {examples.lengths.max()}, and a model to begin "
                "with that has one, too"
            )
        return numbers

    def evaluation(self, dataset: Dataset, split: str) -> Iterator[Batch]:
        """The batches on which a split is evaluated; of val, then those that are answered."""
        yield from super().evaluation(dataset, split)
        if split == "val":
            numbers = self.fitting(dataset.val)[: self.eval_answers]
            for first in range(0, len(numbers), self.batch_size):
                yield self.questions(dataset.val, numbers[first : first + self.batch_size])

    def evaluation_size(self, dataset: Dataset) -> int:
        """How many batches of evaluation give the loss, at most."""
        return super().evaluation_size(dataset)

    def questions(self, examples: Examples, numbers: Sequence[int]) -> Batch:
        """What begin takes, and the right answers as targets, (B, A)."""
        answers = [examples[i][0][slice(*examples[i][1][-1])] for i in numbers]
        asked = [examples[i][0][: examples[i][1][-1, 0]] for i in numbers]
        targets = filled(answers, NO_TARGET, self.block_size)
        return {"asked": filled(asked, NO_TARGET, self.block_size), "targets": targets}

    def checked(self, batch: Batch) -> Batch:
        """The batch, if the model has an embedding for each of its ids."""
        for name in ("ids", "source", "targets"):
            check_ids(batch.get(name, np.zeros(0)), self.vocab_size)
        return batch

    # --------------------------------------------------------------------------------------
    # Answers

    @staticmethod
    def begin(model: GPT, asked: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What generate takes for texts: (B, P) ids, filled up with NO_TARGET."""
        raise NotImplementedError

    def question(self, text: str, tokenizer: Tokenizer) -> list[int]:
        """The ids of a text that is to be answered, as it stands in training."""
        if self.chat:
            return chatml([(USER, text)], tokenizer)[0] + answer_opening(tokenizer)
        return prompt_ids(text, tokenizer)

    def answer(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        text: str,
        *,
        n: int = 1,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        generator: torch.Generator | None = None,
        **options: float | None,
    ) -> list[Iterator[str]]:
        """n answers to the text, as iterators of pieces; or the best one that beams find.

        options: those of generate. Raises ValueError for a text that is longer than the context.
        """
        asked = torch.tensor([self.question(text, tokenizer)], device=model.head.weight.device)
        stop, block_size = stop_ids(tokenizer), model.config.block_size
        if asked.shape[1] > block_size - (model.config.n_encoder_layer == 0):
            raise ValueError(
                f"the text has {asked.shape[1]} tokens: there is room for {block_size} "
                "(block_size), in a decoder with its answer"
            )
        ids, context = self.begin(model, asked)
        limit = min(block_size - ids.shape[1], options.pop("max_new_tokens"))
        if num_beams > 1:
            search = partial(beam_search, num_beams=num_beams, length_penalty=length_penalty)
            found = search(model, ids, max_new_tokens=limit, stop_ids=stop, **context)
            rows = [iter(found.tolist())]
        else:
            context = {name: x.expand(n, *x.shape[1:]) for name, x in context.items()}
            options |= {"max_new_tokens": limit, "generator": generator, "stop_ids": stop}
            rows = rows_of(generate(model, ids.expand(n, -1), **options, **context), n)
        return [stream_text(tokenizer, takewhile(lambda i: i not in stop, row)) for row in rows]

    def write(self, model: GPT, questions: dict[str, Tensor]) -> list[str]:
        """The model's answers to questions; each up to twice as long as the right one."""
        ids, context = self.begin(model, questions["asked"])
        room = self.block_size - ids.shape[1] + 1  # the last token is written, and not read
        limit = min(2 * questions["targets"].shape[1], room)
        stop = stop_ids(self.tokenizer)
        options = {"max_new_tokens": limit, "temperature": 0.0, "stop_ids": stop}
        steps = generate(model, ids, **options, **context)
        rows = torch.stack(list(steps), dim=1).tolist()
        return [self.plain(list(takewhile(lambda i: i not in stop, row))) for row in rows]

    def plain(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens and what fills up."""
        special = {NO_TARGET, *self.tokenizer.special_tokens.values()}
        return self.tokenizer.decode([i for i in ids if i not in special]).strip()

    # --------------------------------------------------------------------------------------
    # Scores

    def tally(self, model: GPT, batch: dict[str, Tensor]) -> Tensor:
        """The sum of the losses and the number of targets; then the sums of text_counts."""
        counts = torch.zeros(2 + N_COUNTS, dtype=torch.float64)
        if "asked" not in batch:
            counts[:2] = loss_counts(model, batch)
            return counts
        wanted = batch["targets"].tolist()
        for found, row in zip(self.write(model, batch), wanted, strict=True):
            if any(i != NO_TARGET for i in row):
                counts[2:] += torch.from_numpy(text_counts(found, self.plain(row)))
        return counts

    def score(self, counts: Tensor, dataset: Dataset) -> dict[str, float]:
        """The loss of a target and its perplexity; and of answers, where there are some."""
        loss = mean_loss(counts)
        answers = text_scores(counts[2:].numpy()) if counts[-1] else {}
        return {"loss": loss, "perplexity": perplexity(loss), **answers}

    def matrix(self, counts: Tensor) -> None:
        """The confusion matrix of few labels; here there is none."""

    def baselines(self, dataset: Dataset) -> dict[str, float]:
        """What models score that have learned nothing, by what they do."""
        return dataset.meta["baselines"]

    def facts(self, dataset: Dataset) -> list[str]:
        """What a person should know of the data, in lines."""
        splits = [getattr(dataset, split) for split in SPLITS]
        long = sum(int(self.too_long(examples).sum()) for examples in splits)
        left = f"{long:,} of them are longer than {self.block_size} tokens, and left out"
        train, val = (f"{len(examples):,}" for examples in splits)
        first = f"{train} examples for training, {val} for validation"
        return [first, *([left] if long else [])]

    def show(self, model: GPT, dataset: Dataset, **options: object) -> tuple[str, Iterator[str]]:
        """Texts of the validation split, with the model's answers and the given ones."""
        lines = []
        for number in self.fitting(dataset.val)[:SHOWN]:
            batch = self.questions(dataset.val, [number])
            device = model.head.weight.device
            questions = {name: torch.from_numpy(a).to(device) for name, a in batch.items()}
            [answer] = self.write(model, questions)
            asked, given = (self.plain(batch[name][0].tolist()) for name in ("asked", "targets"))
            for title, text in (("asked", asked), ("model", answer), ("given", given)):
                text = " ".join(text.split()) or "(nothing)"
                lines.append(f"{title}  {text[:WIDTH]}{' ...' if len(text) > WIDTH else ''}")
        return "the model answers", iter(["\n".join(lines)])


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """The tokens that end an answer."""
    ends = tokenizer.special_tokens.get(ENDS) if can_chat(tokenizer) else None
    return existing(tokenizer.end_of_text, ends)


def repeated_scores(records: Sequence[Record]) -> dict[str, float]:
    """Scores of answers that repeat what is asked."""
    counts = sum(text_counts(*record.parts) for record in records)
    return {f"{name} of repeating the text": n for name, n in text_scores(counts).items()}
