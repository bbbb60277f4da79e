"""The tasks by name, as the key `task` of a config gives it."""

from dataclasses import fields
from typing import Any

from nanolm.tasks.causal import CausalTask

TASKS = {"causal": CausalTask}


def make_task(config: Any) -> CausalTask:
    """The task that a config names, with the keys of the config that are the task's."""
    kind = TASKS[config.task]
    return kind(**{field.name: getattr(config, field.name) for field in fields(kind)})
