"""Learn by writing: python -m nanolm.lab.exercises [CHAPTER] [--hint=N] [--solution=true]

Without a chapter: which there are, and how far one is. With one: the first time, writes the
chapter into exercises/, with functions to write; from then on, grades what stands there.
"""

import ast
import difflib
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nanolm.lab.blanks import Mistake, blanked, functions, is_blank, place
from nanolm.system.config import load_config
from nanolm.system.files import write_text
from nanolm.system.script import run_script
from nanolm.text.documents import read_text

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parent
CHAPTERS = Path(__file__).with_name("chapters")
FOLDER = Path("exercises")
PROGRESS = ".progress.json"  # in it: which functions have passed
SECONDS = 15  # of work, for all laws of a function; whatever takes longer does not end
PATIENCE = 5  # times as long, on a machine that is busy


@dataclass(frozen=True)
class Exercise:
    """A function to write, and how it is graded. The files in chapters/ hold them."""

    chapter: str
    name: str  # of the function, or Class.method
    minutes: int  # that a learner takes
    laws: tuple[str, ...]  # tests of the chapter, as pytest names them
    idea: str  # words of the chapter's note where it is explained
    hints: tuple[str, ...]  # each tells more
    questions: tuple[str, ...]  # expressions of m, the chapter, by which mistakes are told apart
    mistakes: tuple[Mistake, ...]

    def where(self, path: Path) -> str:
        """Where the idea stands, in the learner's file or else in ours."""
        for file in (path, chapter_file(self.chapter)):
            for number, line in enumerate(file.read_text().splitlines(), start=1):
                if self.idea in line:
                    return f"{file}, line {number}"
        raise ValueError(f"{self.name}: {self.idea!r} does not stand in {self.chapter}.py")


@dataclass(frozen=True, kw_only=True)
class ExercisesConfig:
    """The words of the command."""

    chapter: str | None = None  # which one to write; None: list them
    hint: int = 0  # show so many hints for the first function that is not right yet
    solution: bool = False  # show our functions beside yours

    def __post_init__(self):
        known = chapters()
        if self.chapter is not None and self.chapter not in known:
            raise ValueError(f"chapter={self.chapter!r}: choose one of {', '.join(known)}")
        if not 0 <= self.hint <= 3:
            raise ValueError(f"hint={self.hint}: there are 3, each of which tells more")


def chapter_file(chapter: str) -> Path:
    """Where our chapter is."""
    return PACKAGE / f"{chapter}.py"


def chapters() -> list[str]:
    """The chapters that have exercises, in the order of the book."""
    numbered = sorted(CHAPTERS.glob("*.toml"))
    return [path.stem.partition("-")[2] for path in numbered]


def exercises_of(chapter: str) -> list[Exercise]:
    """The exercises of a chapter, in its order."""
    (path,) = CHAPTERS.glob(f"*-{chapter}.toml")
    found = []
    for each in tomllib.loads(path.read_text())["exercise"]:
        mistakes = tuple(Mistake(**one) for one in each.pop("mistake"))
        lists = {key: tuple(each.pop(key)) for key in ("laws", "hints", "questions")}
        found.append(Exercise(chapter=chapter, mistakes=mistakes, **lists, **each))
    return found


# ------------------------------------------------------------------------------------------
# The commands


def list_chapters() -> None:
    """Print the chapters, and how far one is in each."""
    done = progress()
    for chapter in chapters():
        every, path = exercises_of(chapter), FOLDER / f"{chapter}.py"
        passed = sum(each.name in done for each in every)
        state = f"{passed} of {len(every)} done" if path.exists() else f"{len(every)} to write"
        print(f"{chapter:12} {state:14} about {sum(each.minutes for each in every)} minutes")
    print("begin with: make exercise CHAPTER=NAME")


def progress() -> list[str]:
    """The names of the functions that have passed."""
    path = FOLDER / PROGRESS
    return json.loads(path.read_text()) if path.exists() else []


def begin(chapter: str) -> None:
    """Write the chapter with its functions blank."""
    every, path = exercises_of(chapter), FOLDER / f"{chapter}.py"
    path.parent.mkdir(exist_ok=True)
    write_text(path, blanked(chapter_file(chapter).read_text(), [each.name for each in every]))
    print(f"{path} is there: open it, write a function, and give the same command again")
    for each in every:
        print(f"    {each.name:26} {each.minutes:3} minutes; the idea: {each.where(path)}")


def check(chapter: str, config: ExercisesConfig) -> None:
    """Grade what is written, and print what is right and what is not."""
    path, every = FOLDER / f"{chapter}.py", exercises_of(chapter)
    try:
        found = functions(ast.parse(read_text(path)))
    except SyntaxError as error:
        raise ValueError(f"{path}, line {error.lineno}: {error.msg}") from None
    if gone := [each.name for each in every if each.name not in found]:
        raise ValueError(
            f"{path} has lost {', '.join(gone)}: functions and classes keep their names; remove "
            "the file to begin anew"
        )
    written = [each for each in every if not is_blank(found[each.name])]
    done, wrong = set(progress()), None
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        verdicts = list(pool.map(partial(grade, path), written))
    for each, verdict in zip(written, verdicts, strict=True):
        right = verdict["broken"] is None and verdict["held"] > 0
        (done.add if right else done.discard)(each.name)
        if right:
            print(f"right  {each.name}: {verdict['held']} laws hold")
        elif wrong is None:
            wrong = each
            print("\n".join(explanation(each, path, verdict)))
        else:
            print(f"wrong  {each.name}")
    for each in every:
        if each not in written:
            print(f"blank  {each.name}")
    write_text(FOLDER / PROGRESS, json.dumps(sorted(done)))
    following = wrong or next((each for each in every if each not in written), None)
    if following:
        show_help(following, path, config)
    else:
        print(f"all {len(every)} functions of {chapter} are right")


def grade(path: Path, each: Exercise) -> dict[str, Any]:
    """The verdict on a function that is written, from a process of its own."""
    words = [sys.executable, "-m", "nanolm.lab.grading", each.chapter, path.resolve(), each.name]
    failed = {"held": 0, "case": "", "mistake": None}
    try:
        options = {"cwd": ROOT, "capture_output": True, "text": True}
        ended = subprocess.run([*words, str(SECONDS)], timeout=SECONDS * PATIENCE, **options)
    except subprocess.TimeoutExpired:
        ended = None
    if ended is None or ended.returncode < 0:  # or its own limit of work has ended it
        why = f"it does not end within {SECONDS} seconds: is there a loop that never stops?"
        return failed | {"broken": "it ends", "why": why}
    said, why = ended.stdout.splitlines(), ended.stderr.strip().splitlines()
    if ended.returncode or not said or not said[-1].startswith("{"):
        return failed | {"broken": "it runs", "why": (why or ["it ends the program"])[-1]}
    return json.loads(said[-1])


def explanation(each: Exercise, path: Path, verdict: dict[str, Any]) -> Iterator[str]:
    """What went wrong, in lines."""
    law = (verdict["broken"] or "nothing could be tried").removeprefix("test_").replace("_", " ")
    yield f"wrong  {each.name}: this does not hold: {law}"
    if verdict["mistake"]:
        yield f"       it looks like this: {verdict['mistake']}"
    if verdict["why"]:
        yield f"       {verdict['why'][:200]}"
    if verdict["case"]:
        yield f"       the smallest case that was found: {verdict['case']}"
    yield f"       the idea: {each.where(path)}: {each.idea!r}"


def show_help(each: Exercise, path: Path, config: ExercisesConfig) -> None:
    """Print hints, or our function beside the learner's."""
    for number, hint in enumerate(each.hints[: config.hint], start=1):
        print(f"hint {number} for {each.name}: {hint}")
    if config.solution:
        theirs, ours = path.read_text(), chapter_file(each.chapter).read_text()
        bodies = [body_of(source, each.name) for source in (theirs, ours)]
        print("\n".join(difflib.unified_diff(*bodies, "yours", "ours", n=99, lineterm="")))
    elif config.hint < len(each.hints):
        print(
            f"next   {each.name}; a hint: make exercise CHAPTER={each.chapter} "
            f"HINT={config.hint + 1}"
        )


def body_of(source: str, name: str) -> list[str]:
    """The lines of a function's body."""
    first, last = place(functions(ast.parse(source))[name])
    return source.splitlines()[first:last]


def main(arguments: list[str]) -> None:
    """Do what the command says."""
    config = load_config(ExercisesConfig, arguments, positional=("chapter",))
    if not (ROOT / "tests").is_dir():
        raise ValueError("exercises are graded by the tests: clone the repository to do them")
    if config.chapter is None:
        list_chapters()
    elif not (FOLDER / f"{config.chapter}.py").exists():
        begin(config.chapter)
    else:
        check(config.chapter, config)


if __name__ == "__main__":
    run_script(main, __doc__, ExercisesConfig)
