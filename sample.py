"""Sample from a trained model: python sample.py [--out_dir=PATH] [--key=value ...]"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, just ends them
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nanolm.layers import require_at_least
from nanolm.precision import Engine, Hardware, choose_device, choose_engine, find_hardware
from nanolm.runs.chat import Chat, talk
from nanolm.runs.folder import newest_run
from nanolm.runs.load import Trained, load_model
from nanolm.sampling import check_generation_options, until
from nanolm.system.config import load_config
from nanolm.system.files import write_text
from nanolm.system.script import run_script
from nanolm.system.workers import progress
from nanolm.tasks.answering import AnsweringTask
from nanolm.tasks.causal import CausalTask, encode_prompt
from nanolm.tasks.labelled import LabelledTask
from nanolm.tasks.masked import MaskedTask, framed_text
from nanolm.text.documents import read_text, text_or_file


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """The keys of sample.py. Names and defaults are nanoGPT's where it has them."""

    texts = ("start", "stop")

    init_from: str = "resume"  # resume (the run in out_dir) | gpt2 | FOLDER | OWNER/NAME
    out_dir: str | None = None  # the run; None: the one in out/ that was trained last
    start: str | None = None  # the prompt, or FILE:prompt.txt; '\n': a line end; None: a new text
    input: str | None = None  # a file of texts that are answered, a line each
    output: str | None = None  # the file for their answers, a line each; None: the console
    chat: bool = False  # talk with the model in the terminal
    num_samples: int | None = None  # how many texts; None: 10 that begin alike, or one answer
    batch_size: int = 8  # how many of them are written at a time
    max_new_tokens: int = 500  # longest text, in tokens
    temperature: float | None = None  # 0: the likeliest token; above 1: wild; None: 0.8, answers 0
    num_beams: int = 1  # completion, seq2seq: look for the likeliest answer among so many at once
    length_penalty: float = 1.0  # of beams: above 0, longer ones are welcome
    top_k: int | None = 200  # only the k most likely tokens; 0: all
    top_p: float | None = None  # only the likeliest tokens that together reach p
    stop: str | None = None  # end a text before this string; '\n': a line end
    seed: int = 1337  # of the drawing; another num_samples or batch_size draws other texts
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16
    compile: bool | str = "auto"  # auto (on a GPU, for many tokens) | True | False

    def __post_init__(self):
        require_at_least(self, 1, "num_samples batch_size num_beams")
        options = self.max_new_tokens, self.temperature or 0.0, self.top_k, self.top_p
        check_generation_options(*options)
        if self.output and not self.input:
            raise ValueError(f"output={self.output!r}: goes with --input=FILE")
        if self.num_beams > 1000 or not abs(self.length_penalty) <= 10:
            raise ValueError(
                f"num_beams={self.num_beams}, length_penalty={self.length_penalty}: allowed are "
                "1 to 1000, and -10 to 10"
            )
        if self.num_beams > 1 and (self.temperature or self.chat or (self.num_samples or 1) > 1):
            raise ValueError(
                f"num_beams={self.num_beams}: look for one text, the likeliest: leave out "
                "temperature, num_samples and chat"
            )
        if sum(map(bool, (self.start, self.input, self.chat))) > 1:
            raise ValueError("start, input and chat: give one of them")


def check_files(config: SampleConfig) -> None:
    """Raise FileNotFoundError or ValueError where lines cannot be read, or answers not written."""
    if config.input and not Path(config.input).is_file():
        raise FileNotFoundError(f"input={config.input!r}: there is no such file")
    if config.output and not Path(config.output).parent.is_dir():
        raise FileNotFoundError(f"output={config.output!r}: there is no such folder")
    if config.output and Path(config.output).is_dir():
        raise ValueError(f"output={config.output!r}: is a folder")
    if config.output and Path(config.output).resolve() == Path(config.input).resolve():
        raise ValueError(f"output={config.output!r}: is the input, and would be lost")


OPTIONS = ("max_new_tokens", "temperature", "top_k", "top_p")  # of generate

# On a GPU, a step of a small batch takes as long as it takes to start its kernels, and compiled it
# has few. Compiling takes about a minute: by estimate, so many steps earn it back.
COMPILE_FROM_STEPS = 20_000


def sampling_engine(config: SampleConfig, hardware: Hardware) -> Engine:
    """The engine for the texts that the config asks for."""
    n_texts = 1 if config.chat else config.num_samples or CausalTask.usual_samples
    steps = config.max_new_tokens * math.ceil(n_texts / config.batch_size)
    gpu = choose_device(hardware, config.device)[0].startswith("cuda")
    work = math.inf if gpu and steps >= COMPILE_FROM_STEPS else 0.0
    machine = {"device": config.device, "dtype": config.dtype, "compile": config.compile}
    return choose_engine(hardware, **machine, flops=work)


def main(arguments: list[str]) -> None:
    config = load_config(SampleConfig, arguments)
    prompt = "" if config.start is None else text_or_file("start", config.start)
    engine = sampling_engine(config, find_hardware())
    check_files(config)
    resume = config.init_from == "resume"
    name = (config.out_dir or newest_run()) if resume else config.init_from
    if resume and not Path(name).is_dir():
        raise FileNotFoundError(f"out_dir={name!r}: there is no such folder")
    model, tokenizer, origin, task = trained = load_model(name)
    if not (task.continues or config.start or config.input or config.chat):
        raise ValueError(f"{name} answers texts: give one, as{task.asks}")
    if config.num_beams > 1 and not isinstance(task, AnsweringTask):
        raise ValueError(f"num_beams={config.num_beams}: {name} was not trained to answer texts")
    model = model.to(engine.device)
    if engine.compile:
        model.compile(dynamic=True)
    warn_of_cut(prompt, trained)  # and wrong characters show before the first line
    print(f"sampling from {origin}, {engine.device} {engine.dtype}", file=sys.stderr)
    options = {key: getattr(config, key) for key in OPTIONS}
    if config.temperature is None:
        whose = CausalTask if config.chat else task
        options["temperature"] = whose.usual_temperature
    options["generator"] = torch.Generator(engine.device).manual_seed(config.seed)
    if isinstance(task, AnsweringTask):
        options |= {"num_beams": config.num_beams, "length_penalty": config.length_penalty}
    # Less is kept of each step in inference mode; but the weights that autocast has made narrow.
    with engine.autocast(), torch.inference_mode(engine.dtype == "float32"):
        if config.chat:
            talk(Chat(model, tokenizer, options))
        elif config.input:
            answer_lines(partial(task.answer, model, tokenizer, **options), trained, config)
        else:
            write_texts(partial(task.answer, model, tokenizer, **options), task, prompt, config)


def warn_of_cut(text: str, trained: Trained, place: str = "the prompt") -> None:
    """Say on stderr where a model sees only a part of a text. place: where the text stands."""
    tokenizer, task, size = trained.tokenizer, trained.task, trained.model.config.block_size
    labelled = isinstance(task, LabelledTask)
    n = len((framed_text if labelled else encode_prompt)(tokenizer, text))
    if n > size and (labelled or task.continues):  # others refuse such a text
        seen = f"the {'first' if labelled else 'last'} {size} (block_size)"
        print(f"warning: {place} has {n} tokens: the model sees {seen}", file=sys.stderr)


def write_texts(
    answer: Callable[..., list[Iterator[str]]], task: Any, prompt: str, config: SampleConfig
) -> None:
    """Print the texts that the model makes of a prompt."""
    n_texts = config.num_samples or task.usual_samples
    if isinstance(task, LabelledTask | MaskedTask) or config.num_beams > 1:
        n_texts = 1  # there is one answer
    for first in range(0, n_texts, config.batch_size):
        for pieces in answer(prompt, n=min(config.batch_size, n_texts - first)):
            if task.continues:
                print(prompt, end="", flush=True)
            for piece in until(pieces, config.stop):
                print(piece, end="", flush=True)
            print("\n---------------")


def answer_lines(
    answer: Callable[..., list[Iterator[str]]], trained: Trained, config: SampleConfig
) -> None:
    """Write an answer, on one line, to each line of a file; whole or not at all."""
    path = Path(config.input)
    lines = read_text(path).replace("\r\n", "\n").removesuffix("\n").split("\n")  # nowhere else
    answers = []
    for number, line in enumerate(progress(iterable=lines, desc="answers", unit="line"), start=1):
        try:
            warn_of_cut(line, trained, f"{path}, line {number}")
            [pieces] = answer(line, n=1) if line.strip() else [""]
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        answers.append(" ".join("".join(until(pieces, config.stop)).split()))
        if not config.output:
            print(answers[-1], flush=True)
    if config.output:
        write_text(config.output, "".join(f"{line}\n" for line in answers))
        print(f"{len(answers)} answers written to {config.output}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main, __doc__, SampleConfig)
