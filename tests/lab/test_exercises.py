"""Laws of the exercises: ours are right, blank ones wrong, and typical mistakes are named."""

import ast
import json
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

from nanolm.lab import exercises
from nanolm.lab.blanks import functions, is_blank, place
from nanolm.lab.exercises import ROOT, chapter_file, chapters, exercises_of, main
from nanolm.lab.grading import alike, answers, mistake_in, module_of

EXERCISES = {each.name: each for chapter in chapters() for each in exercises_of(chapter)}
MISTAKES = [(name, i) for name, each in EXERCISES.items() for i in range(len(each.mistakes))]


def graded(chapter: str, source: str, name: str, folder: Path) -> dict:
    """The verdict on a function of a learner's file."""
    path = folder / f"{chapter}.py"
    path.write_text(source)
    words = [sys.executable, "-m", "nanolm.lab.grading", chapter, str(path), name, "60"]
    out = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


# ------------------------------------------------------------------------------------------
# What the exercises say


def test_each_name_is_that_of_one_exercise():
    assert len(EXERCISES) == sum(len(exercises_of(chapter)) for chapter in chapters())


@pytest.mark.parametrize("name", EXERCISES)
def test_an_exercise_is_complete(name):
    each = EXERCISES[name]
    assert each.name in functions(ast.parse(chapter_file(each.chapter).read_text()))
    assert len(each.hints) == 3
    assert len(each.mistakes) >= 5
    assert each.minutes > 0
    assert each.where(chapter_file(each.chapter))
    for law in each.laws:
        file, _, test = law.partition("::")
        assert f"def {test}(" in (ROOT / "tests" / file).read_text()


@pytest.mark.parametrize("name", EXERCISES)
def test_every_mistake_is_told_from_ours_and_from_the_others(name):
    """By the answers to the exercise's questions, which are the same whenever they are asked."""
    each = EXERCISES[name]
    ours = chapter_file(each.chapter).read_text()
    versions = {"ours": ours} | {m.says: m.made_in(ours, each.name) for m in each.mistakes}
    assert len(versions) == len(each.mistakes) + 1
    path = chapter_file(each.chapter)
    modules = {says: module_of(source, path) for says, source in versions.items()}
    found = {says: answers(module, each) for says, module in modules.items()}
    assert alike(found["ours"], answers(module_of(ours, path), each))
    for one, other in combinations(found, 2):
        assert not alike(found[one], found[other]), (one, other)


def test_one_of_two_mistakes_is_named():
    each = EXERCISES["attention_weights"]
    path, source = chapter_file(each.chapter), chapter_file(each.chapter).read_text()
    made = [
        m for m in each.mistakes if "causal is forgotten" in m.says or "True is where" in m.says
    ]
    assert len(made) == 2
    both = made[1].made_in(made[0].made_in(source, each.name), each.name)
    assert mistake_in(module_of(both, path), each) in {mistake.says for mistake in made}
    assert mistake_in(module_of(source, path), each) is None


# ------------------------------------------------------------------------------------------
# Grades


@pytest.mark.long
@pytest.mark.parametrize("name", EXERCISES)
def test_ours_is_right(name, tmp_path):
    each = EXERCISES[name]
    verdict = graded(each.chapter, chapter_file(each.chapter).read_text(), name, tmp_path)
    assert verdict["broken"] is None
    assert verdict["held"] >= len(each.laws)


@pytest.mark.long
@pytest.mark.parametrize(("name", "number"), MISTAKES)
def test_a_mistake_is_found_and_named(name, number, tmp_path):
    each = EXERCISES[name]
    mistake = each.mistakes[number]
    source = mistake.made_in(chapter_file(each.chapter).read_text(), name)
    verdict = graded(each.chapter, source, name, tmp_path)
    assert verdict["broken"], mistake.says
    assert verdict["mistake"] == mistake.says


# ------------------------------------------------------------------------------------------
# The command


def write(chapter: str, name: str, body: str) -> None:
    """Put a body in the place of a blank one, as a learner does."""
    path = Path("exercises", f"{chapter}.py")
    source = path.read_text()
    first, last = place(functions(ast.parse(source))[name])
    lines = source.splitlines()
    indent = " " * (len(lines[first]) - len(lines[first].lstrip()))
    lines[first:last] = [indent + line for line in body.splitlines()]
    path.write_text("\n".join(lines) + "\n")


def printed(capsys, *words: str) -> str:
    main([*words])
    return capsys.readouterr().out


def test_a_chapter_is_written_blank_and_everything_else_stays(workplace, capsys):
    out = printed(capsys, "attention")
    source = Path("exercises/attention.py").read_text()
    theirs, ours = (functions(ast.parse(text)) for text in (source, chapter_source("attention")))
    blank = {name for name in theirs if is_blank(theirs[name])}
    assert blank == {each.name for each in exercises_of("attention")}
    for name in theirs.keys() - blank:
        assert ast.unparse(theirs[name]) == ast.unparse(ours[name])
    for name in blank:
        assert ast.get_docstring(theirs[name]) == ast.get_docstring(ours[name])
        assert name in out
    assert "# scores: (B, nh, T, S)" in source


def test_a_learner_goes_through_an_exercise(workplace, capsys):
    """Blank, wrong, a hint, the solution, right; and what is listed."""
    printed(capsys, "attention")
    out = printed(capsys, "attention")
    assert "blank  causal_mask" in out
    assert "next   causal_mask; a hint: make exercise CHAPTER=attention HINT=1" in out
    write("attention", "causal_mask", "return torch.ones(T, S).tril().bool()")
    out = printed(capsys, "attention", "--hint=1")
    assert "wrong  causal_mask: this does not hold: the last query stands at the last key" in out
    assert "it looks like this: the mask is aligned at the top left" in out
    assert "the idea: exercises/attention.py, line" in out
    assert "hint 1 for causal_mask" in out
    assert "0 of" in printed(capsys)
    out = printed(capsys, "attention", "--solution=true")
    assert "-    return torch.ones(T, S).tril().bool()" in out
    assert (
        "+    return torch.ones(T, S, dtype=torch.bool, device=device).tril(diagonal=S - T)" in out
    )
    write("attention", "causal_mask", "return torch.ones(T, S).bool().tril(S - T)")
    out = printed(capsys, "attention")
    assert "right  causal_mask" in out
    assert "attention    1 of" in printed(capsys)


def test_the_smallest_case_is_shown(workplace, capsys):
    printed(capsys, "attention")
    body = "a, b = x.chunk(2, dim=-1)\ncos, sin = (each.to(x.dtype) for each in angles)\n"
    write("attention", "rotate", f"{body}return torch.cat((a * cos + b * sin, a * sin), dim=-1)")
    out = printed(capsys, "attention")
    assert re.search(r"the smallest case that was found: hs=2, theta=10.0,", out)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("while True: pass", "it does not end within"),
        ("return masque", "name 'masque' is not defined"),
        *(
            pytest.param(body, message, marks=pytest.mark.long)
            for body, message in (
                ("return torch.ones(T, S, 2).bool()", "wrong  causal_mask"),
                ("raise KeyboardInterrupt", "it interrupts the laws"),
                ("import pytest; pytest.skip('later')", "it skips the law"),
                ("import sys; sys.exit()", "wrong  causal_mask"),
                ("import os; os._exit(0)", "it ends the program"),
            )
        ),
    ],
)
def test_what_does_not_run_is_said_in_a_line(body, message, workplace, capsys, monkeypatch):
    monkeypatch.setattr(exercises, "SECONDS", 8)
    printed(capsys, "attention")
    write("attention", "causal_mask", body)
    assert message in printed(capsys, "attention")


def test_a_file_that_is_no_python_is_said_with_its_line(workplace, capsys):
    printed(capsys, "attention")
    path = Path("exercises/attention.py")
    path.write_text(path.read_text().replace("def causal_mask(", "def causal_mask(:"))
    with pytest.raises(ValueError, match=r"exercises/attention.py, line \d+: invalid syntax"):
        main(["attention"])
    with pytest.raises(ValueError, match=r"chapter='none': choose one of .*attention"):
        main(["none"])


def test_a_function_that_is_gone_is_missed(workplace, capsys):
    printed(capsys, "attention")
    path = Path("exercises/attention.py")
    path.write_text(path.read_text().replace("def rotate(", "def turn("))
    with pytest.raises(ValueError, match=r"attention\.py has lost rotate: functions and classes"):
        main(["attention"])
    with pytest.raises(ValueError, match="hint=4: there are 3"):
        main(["attention", "--hint=4"])


def test_an_idea_is_found_in_ours_where_the_learner_has_removed_it(tmp_path):
    each, path = EXERCISES["causal_mask"], tmp_path / "attention.py"
    path.write_text(chapter_source("attention"))
    assert each.where(path).startswith(f"{path}, line ")
    path.write_text("")
    assert each.where(path).startswith(f"{chapter_file('attention')}, line ")


def chapter_source(chapter: str) -> str:
    return chapter_file(chapter).read_text()


def test_the_course_has_every_exercise_once():
    page = (ROOT / "docs/course.md").read_text()
    rows = [line.split("|")[3] for line in page.splitlines() if line.startswith("| ")]
    named = [name for cell in rows for part in cell.split(";") for name in listed(part)]
    assert sorted(named) == sorted((each.chapter, each.name) for each in EXERCISES.values())


def listed(part: str) -> list[tuple[str, str]]:
    """The exercises that a cell's part names: `chapter`: `one`, `another`."""
    chapter, *names = re.findall(r"`([\w.]+)`", part) or [""]
    return [(chapter, name) for name in names]
