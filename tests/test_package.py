"""Laws of the package as a whole."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(path.stem for path in (ROOT / "nanolm").glob("*.py") if path.stem != "__init__")

WATCH = """
import importlib, locale, logging, os, random, signal, sys, warnings
import numpy, regex, tiktoken, torch, tqdm, urllib.request

def state():
    return [
        torch.get_default_dtype(), torch.get_num_threads(), torch.initial_seed(),
        torch.get_rng_state().tolist(), torch.get_float32_matmul_precision(),
        torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
        random.getstate(), str(numpy.random.get_state()), numpy.geterr(),
        dict(os.environ), os.getcwd(), locale.setlocale(locale.LC_ALL), sys.path[:],
        logging.root.level, logging.root.handlers[:], warnings.filters[:],
        [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
    ]

before = state()
for name in sys.argv[1:]:
    importlib.import_module("nanolm." + name)
    assert state() == before, name
"""


def test_importing_prints_nothing_and_changes_no_global_state():
    run = subprocess.run(
        [sys.executable, "-c", WATCH, *MODULES], cwd=ROOT, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def chapters() -> list[str]:
    """The files of nanolm/ in the order of the README's table."""
    return re.findall(r"^\| \d+ \| \[?`(\w+)\.py`", (ROOT / "README.md").read_text(), re.MULTILINE)


def imported(module: str) -> set[str]:
    """The chapters that a chapter imports."""
    tree = ast.parse((ROOT / "nanolm" / f"{module}.py").read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "nanolm":
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nanolm."):
            names.add(node.module.removeprefix("nanolm."))
    return names


def test_the_table_of_the_readme_lists_every_chapter_once():
    assert sorted(chapters()) == MODULES


def test_a_chapter_imports_only_chapters_above_it():
    for i, module in enumerate(chapters()):
        assert imported(module) <= set(chapters()[:i]), module


def test_the_model_knows_nothing_of_files_devices_and_optimizers():
    assert imported("attention") == set()
    assert imported("loss") == set()
    assert imported("model") == {"attention", "loss"}
    assert imported("sampling") == set()


def test_every_public_name_has_a_docstring():
    """Those of classes too, but for forward and what is a few lines long and speaks for itself."""
    for module in MODULES:
        tree = ast.parse((ROOT / "nanolm" / f"{module}.py").read_text())
        assert ast.get_docstring(tree), module
        owners = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
        for node in [node for owner in owners for node in owner.body]:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_":
                short = node.end_lineno - node.lineno < 4
                assert short or ast.get_docstring(node), f"{module}.{node.name}"
