"""Laws of the package as a whole."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nanolm"

# The rooms, and the rooms that each may import; the book is open to all of them but system/.
ROOMS = {
    "system": (),
    "text": ("book", "system"),
    "tasks": ("book", "text", "system"),
    "hub": ("book", "text", "tasks", "system"),
    "runs": ("book", "text", "tasks", "hub", "system"),
    "plan": ("book", "text", "tasks", "runs", "system"),
    "lab": ("book", "text", "tasks", "hub", "runs", "plan", "system"),
}


def name_of(path: Path) -> str:
    """The dotted name of a module below nanolm."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def room_of(module: str) -> str:
    return module.split(".")[0] if "." in module else "book"


PATHS = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if path.stem != "__init__"}

WATCH = """
import importlib, locale, logging, os, random, signal, sys, warnings
import numpy, regex, tiktoken, torch, torch.distributed.tensor, tqdm, urllib.request

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
        [sys.executable, "-c", WATCH, *PATHS], cwd=ROOT, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


# ------------------------------------------------------------------------------------------
# Who imports whom


def imported(path: Path) -> set[str]:
    """The modules of nanolm that a file imports, wherever in it, by their dotted names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a name comes from"
            found = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        else:
            continue
        below = {name.removeprefix("nanolm.") for name in found if name.startswith("nanolm.")}
        names |= below.intersection(PATHS)
    return names


GRAPH = {name: imported(path) for name, path in PATHS.items()}
README = (ROOT / "README.md").read_text(encoding="utf-8")


def chapters() -> list[str]:
    """The files of the book in the order of the README's table."""
    return re.findall(r"^\| \d+ \| \[?`(\w+)\.py`", README, re.MULTILINE)


def test_the_tables_of_the_readme_list_every_file_once():
    assert sorted(chapters()) == [name for name in PATHS if room_of(name) == "book"]
    rows = re.findall(r"^\| `(\w+)/` \|(.*)", README, re.MULTILINE)
    listed = [f"{room}.{name}" for room, row in rows for name in re.findall(r"`(\w+)\.py`", row)]
    assert sorted(listed) == [name for name in PATHS if room_of(name) != "book"]


def test_the_book_is_closed_and_a_chapter_imports_only_chapters_above_it():
    for i, chapter in enumerate(chapters()):
        assert GRAPH[chapter] <= set(chapters()[:i]), chapter


def test_the_model_knows_nothing_of_files_devices_and_optimizers():
    assert GRAPH["attention"] == set()
    assert GRAPH["loss"] == set()
    assert GRAPH["layers"] == {"attention"}
    assert GRAPH["model"] == {"attention", "layers", "loss"}
    assert GRAPH["sampling"] == {"attention"}


@pytest.mark.parametrize("module", [name for name in PATHS if room_of(name) != "book"])
def test_a_room_imports_only_what_it_may(module):
    room = room_of(module)
    foreign = {name for name in GRAPH[module] if room_of(name) not in (room, *ROOMS[room])}
    assert not foreign


def test_no_circle_of_imports_and_no_room_that_is_not_listed():
    done: set[str] = set()
    while ready := {name for name in GRAPH if name not in done and GRAPH[name] <= done}:
        done |= ready
    assert done == set(GRAPH)
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_is_for_and_holds_no_code(room):
    tree = ast.parse((PACKAGE / room / "__init__.py").read_text())
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1


def test_system_needs_the_standard_library_and_tqdm_alone():
    for name, path in PATHS.items():
        if room_of(name) == "system":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    module = getattr(node, "module", None) or node.names[0].name
                    assert module.split(".")[0] in {"nanolm", "tqdm", *sys.stdlib_module_names}


def test_every_public_name_has_a_docstring():
    """Those of classes too, but for forward and what is a few lines long and speaks for itself."""
    for module, path in PATHS.items():
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), module
        owners = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
        for node in [node for owner in owners for node in owner.body]:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_":
                short = node.end_lineno - node.lineno < 4
                assert short or ast.get_docstring(node), f"{module}.{node.name}"
