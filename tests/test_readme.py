"""The README says what is true: its commands, flags, files and output are those of the project."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from conftest import TINY
from torch.distributed.run import get_args_parser

from nanolm.hub.models import export_model
from nanolm.layers import ModelConfig
from nanolm.model import GPT
from nanolm.runs.load import WORDS, ExportConfig
from nanolm.runs.settings import TrainConfig
from nanolm.system.config import load_config
from nanolm.text.tokenizer import BPETokenizer
from prepare import PrepareConfig
from sample import SampleConfig

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {
    "train.py": (TrainConfig, ()),
    "prepare.py": (PrepareConfig, ("name",)),
    "sample.py": (SampleConfig, ()),
}
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line
]
OTHERS = {"vllm", "llama-cli", "convert_hf_to_gguf.py"}  # programs of other projects
OUTPUT = re.search(r"```\n(\$ make train\n.*?)```", README, re.DOTALL)[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one_that_the_project_understands(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *words = shlex.split(command)
    if OTHERS.intersection([program, words[0]]):
        return
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words) <= set(targets)
    elif words[:2] == ["-m", "nanolm.runs.load"]:
        load_config(ExportConfig, words[2:], positional=WORDS)
    elif words[:1] == ["-m"]:
        importlib.import_module(words[1]).parser().parse_args(words[2:])
    elif program in ("python", "torchrun"):
        if program == "torchrun":  # its own flags come first
            parsed = get_args_parser().parse_args(words)
            words = [parsed.training_script, *parsed.training_script_args]
        cls, positional = SCRIPTS[words[0]]
        assert (ROOT / words[0]).is_file()
        load_config(cls, [word for word in words[1:] if word != "--help"], positional=positional)
    else:
        raise AssertionError(f"{program} is no program of the project")


def test_every_file_that_is_named_exists():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    named = re.findall(r"`((?:config|nanolm|tests|docs)/[\w./]*)`", README)
    assert links
    assert named
    for path in links + named:
        assert (ROOT / path).exists(), path


def test_the_examples_in_python_hold(workplace):
    tokenizer = BPETokenizer.train(["a text"], 260)
    config = ModelConfig(vocab_size=260, block_size=64, n_layer=1, n_head=1, n_embd=4)
    export_model(GPT(config), tokenizer, "mymodel")
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, {})


def test_every_config_has_its_row():
    rows = re.findall(r"^\| `config/(\w+\.py)` \|", README, re.MULTILINE)
    assert sorted(rows) == sorted(path.name for path in (ROOT / "config").glob("*.py"))


def test_the_output_shown_has_the_form_of_what_is_printed(tiny_run, run_main):
    """Line by line: the same labels in the same order, and rows of the same columns."""

    def form(text: str) -> list[str]:
        lines = [line for line in text.splitlines() if not line.startswith(("    |", "...", "$"))]
        lines = [re.sub(r"[-+\d.,e]+\w*", "0", line) for line in lines if "|" in line]
        return list(dict.fromkeys(re.sub(r"\s+", " ", line) for line in lines))

    def labels(text: str) -> list[str]:
        return re.findall(r"^([a-z]+) {2,}(?=[a-z\d])", text, re.MULTILINE)

    _, out, _ = run_main("train", *TINY, "--out_dir=out/x", "--max_iters=4")
    assert list(dict.fromkeys(labels(OUTPUT))) == list(dict.fromkeys(labels(out)))
    assert set(form(OUTPUT)) == set(form(out))
