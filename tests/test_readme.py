"""The README and the pages of docs/ say what is true, and are short enough to be read."""

import ast
import importlib
import io
import re
import shlex
import tokenize
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import TINY
from torch.distributed.run import get_args_parser

from nanolm.hub.models import export_model
from nanolm.lab.compare import CompareConfig
from nanolm.lab.look import LookConfig
from nanolm.layers import ModelConfig
from nanolm.model import build_model
from nanolm.plan.costs import PlanConfig
from nanolm.runs.export import WORDS, ExportConfig
from nanolm.runs.settings import TrainConfig
from nanolm.system.config import load_config, split_arguments
from nanolm.text.tokenizer import BPETokenizer
from prepare import PrepareConfig
from sample import SampleConfig

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nanolm"
PATHS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "config" / "README.md"]
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PATHS}
README = PAGES["README.md"]
OUTPUT = re.search(r"```\n(\$ make train\n.*?)```", README, re.DOTALL)[1]
SCRIPTS = {
    "train.py": (TrainConfig, ()),
    "prepare.py": (PrepareConfig, ("name",)),
    "sample.py": (SampleConfig, ()),
}
OTHERS = {"source", "sbatch", "pip", "vllm", "transformers", "ollama", "llama-server"}  # not ours
OTHERS |= {"llama_cpp.server"}

# Tokens that make no line a line of code.
NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)


def blocks(language: str) -> list[str]:
    """The fenced blocks of all pages in a language."""
    return re.findall(rf"```{language}\n(.*?)```", "\n".join(PAGES.values()), re.DOTALL)


COMMANDS = [line.split("  #")[0] for block in blocks("sh") for line in block.splitlines()]


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_every_command_is_one_that_the_project_understands(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *words = shlex.split(command)
    if OTHERS.intersection([program, *words[:2]]):
        return
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        targets = re.findall(r"^([\w-]+):", makefile, re.MULTILINE)
        assert {word for word in words if "=" not in word} <= set(targets)
        assert all(
            re.search(rf"\$\({word.split('=')[0]}\b", makefile) for word in words if "=" in word
        )
    elif words[:2] == ["-m", "nanolm.runs.export"]:
        load_config(ExportConfig, words[2:], positional=WORDS)
    elif words[:2] == ["-m", "nanolm.plan"]:
        load_config(PlanConfig, words[2:])
    elif words[:2] == ["-m", "nanolm.lab.look"]:
        load_config(LookConfig, words[2:])
    elif words[:2] == ["-m", "nanolm.lab.compare"]:
        split_arguments(CompareConfig, words[2:])
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


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_in_a_sentence_is_a_key_of_a_script(page):
    prose = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    classes = [PlanConfig, LookConfig, *(cls for cls, _ in SCRIPTS.values())]
    keys = {f"--{field.name}" for cls in classes for field in fields(cls)}
    flags = re.findall(r"`(--[\w-]+)", prose)
    assert set(flags) <= {"--help", *keys, *get_args_parser()._option_string_actions}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_every_file_that_is_named_exists(page):
    links = re.findall(r"\]\(([^)#:]+)\)", PAGES[page])
    named = re.findall(r"`((?:config|nanolm|tests|benchmarks|docs)/[\w./]*)`", PAGES[page])
    paths = [*((ROOT / page).parent / link for link in links), *(ROOT / name for name in named)]
    assert [path for path in paths if not path.exists()] == []


def test_every_page_is_found_from_the_readme_and_is_short():
    assert len(README.encode()) <= 9_000
    pages = PAGES.keys() - {"README.md"}
    assert set(re.findall(r"\]\(([^)#:]+\.md)\)", README)) == pages
    assert [page for page in pages if PAGES[page].count("\n") > 120] == []


def test_the_examples_in_python_hold(workplace):
    tokenizer = BPETokenizer.train(["a text"], 260)
    shape = {"vocab_size": 260, "block_size": 64, "n_layer": 1, "n_head": 1, "n_embd": 4}
    export_model(build_model(ModelConfig(**shape)), tokenizer, "mymodel")
    labels = {"head": "text", "labels": ("bad", "good"), "causal": False}
    modern = {"norm": "rms", "position": "rotary", "mlp": "swiglu", "bias": False}
    config = ModelConfig(**shape, **labels, **modern)
    export_model(build_model(config), tokenizer, "myreviews")
    assert blocks("python")
    for block in blocks("python"):
        exec(block, {})


def test_every_config_has_its_row():
    rows = re.findall(r"^\| `config/(\w+\.py)` \|", PAGES["config/README.md"], re.MULTILINE)
    assert sorted(rows) == sorted(path.name for path in (ROOT / "config").glob("*.py"))


def test_what_the_readme_has_measured_is_on_the_page_about_speed():
    rows = re.search(r"\| work \|.*?\n\n", README, re.DOTALL)[0].split("\n")
    assert set(rows) <= set(PAGES["docs/speed.md"].split("\n"))


def test_the_hour_of_reading_names_functions_that_exist_and_about_400_lines():
    total = 0
    for row in re.findall(r"^\d+\. (`.*)", README, re.MULTILINE):
        file, *names = re.findall(r"`([\w.]+)`", row)
        body = ast.parse((PACKAGE / file).read_text()).body
        found = {n.name: n for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        missing = set(names) - found.keys()
        assert not missing, f"{file} has no {missing}: name what is worth reading in it now"
        total += sum(found[name].end_lineno - found[name].lineno + 1 for name in names)
    assert 350 <= total <= 450


def code_lines(path: Path) -> int:
    """Lines of a file, or of all files of a folder, without blanks, comments and docstrings."""
    if path.is_dir():
        return sum(map(code_lines, path.glob("*.py")))
    text = path.read_text()
    tokens = tokenize.generate_tokens(io.StringIO(text.rstrip()).readline)
    spans = [(token.start[0], token.end[0]) for token in tokens if token.type not in NO_CODE]
    lines = {n for first, last in spans[:-1] for n in range(first, last + 1)}  # the last: the end
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_code_lines_are_those_that_hold_code(tmp_path):
    text = '"""A\n\ndocstring."""\n\n# a comment\ndef f(x):  # 1\n    """Another."""\n\n'
    text += '    y = """a\n    string"""  # 2 and 3\n    return (\n        x + y\n    )\n'
    (tmp_path / "file.py").write_text(text)
    assert code_lines(tmp_path / "file.py") == code_lines(tmp_path) == 6


def test_the_tables_say_how_many_lines_of_code_there_are():
    row = r"^(\| (?:\d+ \| )?`(\w+(?:/|\.py))` \| )[\d,]+ "
    right = re.sub(
        row, lambda m: f"{m[1]}{code_lines(PACKAGE / m[2]):,} ", README, flags=re.MULTILINE
    )
    pairs = zip(README.split("\n"), right.split("\n"), strict=True)
    wrong = [new for old, new in pairs if old != new]
    assert not wrong, "the code has changed: write these rows\n" + "\n".join(wrong)


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
