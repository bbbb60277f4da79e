"""Grade a chapter that a learner has written: run by exercises.py, in a process of its own.

    python -m nanolm.lab.grading CHAPTER FILE NAME SECONDS

The learner's file takes the place of the chapter, for the chapter's own laws and for everything
that they use. Its other exercises are ours, so that one function is not blamed for another. Prints
the verdict as JSON.

What went wrong is told in two ways. The law that fails gives the smallest case that it has found.
And the function is asked the same questions as one with a typical mistake: where both give the
same wrong answers, that mistake is named.
"""

import ast
import json
import sys
import types
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from itertools import takewhile
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import pytest
import torch

from nanolm.lab.blanks import filled
from nanolm.lab.exercises import ROOT, Exercise, chapter_file, exercises_of

LAWS = ["-q", "-x", "-p", "no:cacheprovider", "--durations=0", "-m", "not long"]
SHOWN = 600  # characters of a case, at most
NUMBERS = (np.ndarray, np.generic, float, int)
CASE = ("Failing test case", "Falsifying example")  # as Hypothesis calls it


def put_in_place(chapter: str, path: Path, others: Sequence[str]) -> types.ModuleType:
    """The learner's chapter, imported in the place of ours; but other functions are ours."""
    ours = ast.parse(chapter_file(chapter).read_text())
    tree = filled(ast.parse(path.read_bytes(), str(path)), ours, others)
    return executed(compile(tree, str(path), "exec"), f"nanolm.{chapter}", path)


def executed(code: Any, name: str, path: Path) -> types.ModuleType:
    """A module of that code, known by its name while its classes are made, and afterwards."""
    module = types.ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    exec(code, module.__dict__)
    return module


def answers(module: types.ModuleType, exercise: Exercise) -> list[Any]:
    """What the functions of a chapter say to the exercise's questions; errors are answers, too."""
    found, names = [], {"m": module, "torch": torch, "np": np}
    for question in exercise.questions:
        torch.manual_seed(0)
        try:
            found.append(eval(question, names))
        except BaseException as error:  # also one that would end the program
            found.append(type(error).__name__)
    return found


def alike(one: Any, other: Any) -> bool:
    """Whether two answers are the same, numbers to rounding."""
    one, other = (x.detach().double().numpy() if torch.is_tensor(x) else x for x in (one, other))
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, NUMBERS) and isinstance(other, NUMBERS):
        same = np.shape(one) == np.shape(other)
        return same and bool(np.allclose(one, other, rtol=1e-4, atol=1e-6, equal_nan=True))
    return type(one) is type(other) and one == other


def mistake_in(module: types.ModuleType, exercise: Exercise) -> str | None:
    """What is wrong, in words, if it is one of the typical mistakes; of several, the largest.

    That is one whose wrong answers are all found, whatever else may be wrong.
    """
    path, found = chapter_file(exercise.chapter), answers(module, exercise)
    ours = path.read_text()
    right, most, says = answers(module_of(ours, path), exercise), 0, None
    for mistake in exercise.mistakes:
        wrong = answers(module_of(mistake.made_in(ours, exercise.name), path), exercise)
        pairs = zip(found, wrong, right, strict=True)
        hits = [alike(theirs, its) for theirs, its, good in pairs if not alike(its, good)]
        if all(hits) and len(hits) > most:
            most, says = len(hits), mistake.says
    return says


def module_of(source: str, path: Path) -> types.ModuleType:
    """A version of the chapter, which nothing else uses."""
    return executed(compile(source, str(path), "exec"), "nanolm.lab.version", path)


class Verdict:
    """A plugin of pytest that notes which laws hold, and of the first that does not, the case."""

    def __init__(self):
        self.held, self.broken, self.case, self.why = 0, None, "", ""

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self) -> None:
        """Fewer examples, always the same, and no search for explanations: it is to be quick."""
        from hypothesis import Phase, settings

        phases = [Phase.explicit, Phase.generate, Phase.shrink]
        options = {"max_examples": 40, "derandomize": True, "database": None, "phases": phases}
        options["report_multiple_bugs"] = False
        settings.register_profile("exercise", settings(), **options)
        settings.load_profile("exercise")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note how a law has ended."""
        if report.when == "call" and report.passed:
            self.held += 1
        elif report.when == "call" and report.skipped and self.broken is None:
            self.broken, self.why = report.nodeid.split("::")[-1], "it skips the law"
        elif report.failed and self.broken is None:
            self.broken = report.nodeid.split("::")[-1]
            lines = report.longreprtext.splitlines()
            errors = [line[1:].strip() for line in lines if line.startswith("E ")]
            self.why = next((line for line in errors if line), "")
            starts = [i for i, line in enumerate(errors) if line.startswith(CASE)]
            if starts:
                case = takewhile(lambda line: line != ")", errors[starts[-1] + 1 :])
                self.case = shorten(" ".join(case), SHOWN, placeholder=" ...")


def grade(exercise: Exercise, module: types.ModuleType) -> dict[str, Any]:
    """Which laws of a function hold; of the first that does not, the case, and the mistake."""
    verdict = Verdict()
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        code = pytest.main(
            [*LAWS, *(str(ROOT / "tests" / law) for law in exercise.laws)], [verdict]
        )
    if code > 1 and verdict.broken is None:
        verdict.broken, verdict.why = "it runs to its end", "it interrupts the laws"
    found = {"held": verdict.held, "broken": verdict.broken}
    if verdict.broken or not verdict.held:
        found |= {
            "why": verdict.why,
            "case": verdict.case,
            "mistake": mistake_in(module, exercise),
        }
    return found


def main(chapter: str, path: str, name: str, seconds: str) -> None:
    """Print a verdict on the function, after so many seconds of work at most."""
    with suppress(ImportError):  # of Unix: a loop that never stops ends the process
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds)))
    every = {each.name: each for each in exercises_of(chapter)}
    module = put_in_place(chapter, Path(path), [other for other in every if other != name])
    print(json.dumps(grade(every[name], module)))


if __name__ == "__main__":
    main(*sys.argv[1:])
