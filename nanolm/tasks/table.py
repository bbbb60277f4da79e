"""The tasks by name, as the key `task` of a config gives it."""

from dataclasses import fields
from typing import Any

from nanolm.layers import ModelConfig
from nanolm.tasks.causal import CausalTask
from nanolm.tasks.classification import ClassificationTask
from nanolm.tasks.masked import MaskedTask
from nanolm.tasks.tagging import TaggingTask

TASKS = {
    "causal": CausalTask,
    "masked": MaskedTask,
    "classification": ClassificationTask,
    "tagging": TaggingTask,
}


def task_of(model: ModelConfig) -> type[CausalTask]:
    """The task that a model with that head is trained for."""
    by_head = {"text": ClassificationTask, "words": TaggingTask}
    return by_head.get(model.head, CausalTask if model.causal else MaskedTask)


def make_task(config: Any) -> Any:
    """The task that a config names, with the keys of the config that are the task's."""
    kind = TASKS[config.task]
    return kind(**{field.name: getattr(config, field.name) for field in fields(kind)})
