"""The tasks by name, as the key `task` of a config gives it."""

from dataclasses import fields
from typing import Any

from nanolm.layers import ModelConfig
from nanolm.tasks.causal import CausalTask
from nanolm.tasks.classification import ClassificationTask
from nanolm.tasks.completion import CompletionTask
from nanolm.tasks.masked import MaskedTask
from nanolm.tasks.seq2seq import Seq2SeqTask
from nanolm.tasks.tagging import TaggingTask
from nanolm.text.tokenizer import Tokenizer

TASKS = {
    "causal": CausalTask,
    "masked": MaskedTask,
    "classification": ClassificationTask,
    "tagging": TaggingTask,
    "completion": CompletionTask,
    "seq2seq": Seq2SeqTask,
}


def task_of(model: ModelConfig) -> str:
    """The name of the task that a model of that shape is for, where nothing else says it."""
    by_head = {"text": "classification", "words": "tagging"}
    by_kind = {"a decoder": "causal", "an encoder": "masked", "an encoder-decoder": "seq2seq"}
    return by_head.get(model.head) or by_kind[model.kind]


def make_task(config: Any, tokenizer: Tokenizer) -> Any:
    """The task that a config names, with the keys of the config that are the task's."""
    kind = TASKS[config.task]
    known = {"tokenizer": tokenizer}
    return kind(**{f.name: known.get(f.name) or getattr(config, f.name) for f in fields(kind)})
