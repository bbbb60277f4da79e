"""A trained model by its name: that of a run, of a folder of Hugging Face's format, or a hub's."""

import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanolm.hub.models import CONFIG, PARTS, WEIGHTS, load_pretrained
from nanolm.hub.names import find_folder
from nanolm.hub.tokenizers import FILES
from nanolm.layers import ModelConfig
from nanolm.model import Transformer, build_model
from nanolm.runs import checkpoint
from nanolm.runs.folder import holds_a_run
from nanolm.runs.settings import TrainConfig, model_config_of
from nanolm.tasks.table import make_task, task_of
from nanolm.text.conversations import can_chat
from nanolm.text.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer

CONFIG_KEYS = tuple(field.name for field in fields(TrainConfig))


class Trained(NamedTuple):
    """A trained model, and what goes with it."""

    model: Transformer
    tokenizer: Tokenizer
    origin: str  # where they come from, in words
    task: Any  # what the model is for (see tasks/)


def load_model(name: str | Path) -> Trained:
    """A trained model, its tokenizer and its task.

    name: the folder of a run or of a pretrained model, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or
    OWNER/NAME on the Hugging Face hub. Raises ValueError or FileNotFoundError where there is none,
    or none that nanolm can express.
    """
    patterns = (CONFIG, WEIGHTS, PARTS, *FILES)
    folder = find_folder(str(name), patterns)
    if holds_a_run(folder):
        model, tokenizer, content = load_trained(folder)
        keys = {key: content["config"][key] for key in CONFIG_KEYS if key in content["config"]}
        config = TrainConfig(**keys | asdict(model.config))
        origin = f"{name}, step {content['step']}"
        return Trained(model, tokenizer, origin, make_task(config, tokenizer))
    if not (folder / CONFIG).exists():
        raise FileNotFoundError(
            f"{name} holds no model: neither a run's checkpoints (train one with train.py) nor "
            f"the {CONFIG} of a pretrained one"
        )
    model, tokenizer = load_pretrained(folder)
    return Trained(model, tokenizer, str(name), usual_task(model.config, tokenizer))


def usual_task(shape: ModelConfig, tokenizer: Tokenizer) -> Any:
    """The task that a model is for, where its shape alone says it."""
    keys = {"task": task_of(shape), "chat": can_chat(tokenizer)}
    return make_task(TrainConfig(**asdict(shape), **keys), tokenizer)


def load_trained(folder: Path) -> tuple[Transformer, Tokenizer, dict]:
    """The best model of a run, its tokenizer, and its checkpoint.

    Raises FileNotFoundError where the run has lost its tokenizer, ValueError where its files are
    damaged.
    """
    content, problems = checkpoint.load_best(folder, check_fits)
    for problem in problems:
        print(f"warning: {problem}; using another one", file=sys.stderr)
    if not (folder / TOKENIZER_FILE).exists():
        raise FileNotFoundError(f"{folder} has lost its {TOKENIZER_FILE}: copy it there again")
    tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
    model = build_model(model_config_of(content["config"]))
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"{folder / TOKENIZER_FILE} has {tokenizer.vocab_size} tokens and the model beside it "
            f"{model.config.vocab_size}: put the run's own tokenizer back"
        )
    model.load_state_dict(content["model"])
    return model.eval(), tokenizer, content


def check_fits(content: dict) -> None:
    """Raise an error where a checkpoint's weights are not those of the model in its config."""
    with torch.device("meta"):  # shapes without memory
        model = build_model(model_config_of(content["config"]))
    weights = dict(content["model"])  # torch would note in the original how it was loaded here
    model.load_state_dict(weights, assign=True)
