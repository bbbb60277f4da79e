"""A chapter as an exercise: its functions without their bodies, and what a learner puts there."""

import ast
from collections.abc import Collection, Iterator
from dataclasses import dataclass

BLANK = 'raise NotImplementedError("write me")'
Function = ast.FunctionDef


def functions(tree: ast.Module) -> dict[str, Function]:
    """The functions of a chapter by name; methods as Class.method."""
    found = {node.name: node for node in tree.body if isinstance(node, Function)}
    for each in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        found |= {f"{each.name}.{f.name}": f for f in each.body if isinstance(f, Function)}
    return found


def statements(function: Function) -> list[ast.stmt]:
    """The body, without the docstring."""
    return function.body[ast.get_docstring(function) is not None :]


def is_blank(function: Function) -> bool:
    """Whether nobody has written it yet."""
    return [ast.unparse(line) for line in statements(function)] == [ast.unparse(ast.parse(BLANK))]


def blanked(source: str, names: Collection[str]) -> str:
    """The chapter with these functions blank; comments that tell the shape of something stay."""
    lines, found = source.splitlines(), functions(ast.parse(source))
    for name in sorted(names, key=lambda name: -found[name].lineno):  # from below: lines stay put
        first, last = place(found[name])
        body = lines[first:last]
        indent = body[0][: len(body[0]) - len(body[0].lstrip())]
        lines[first:last] = [*(indent + shape for shape in shapes(body)), indent + BLANK]
    return "\n".join(lines) + "\n"


def place(function: Function) -> tuple[int, int]:
    """The lines of a body, as a slice."""
    body = statements(function)
    return body[0].lineno - 1, function.end_lineno


def shapes(body: Collection[str]) -> Iterator[str]:
    """What the comments of a body tell of shapes: # scores: (B, nh, T, S)."""
    for line in body:
        code, comment, shape = line.partition("  # (")
        target, assigned, _ = code.strip().partition(" = ")
        if comment:
            yield f"# {target if assigned else 'the result'}: ({shape}"


def filled(theirs: ast.Module, ours: ast.Module, names: Collection[str]) -> ast.Module:
    """The learner's chapter, with our bodies in these functions.

    Raises ValueError for one that is no longer there.
    """
    mine, found = functions(ours), functions(theirs)
    for name in names:
        if name not in found:
            raise ValueError(f"{name} is no longer there: it has to keep its name")
        found[name].body = mine[name].body
    return theirs


@dataclass(frozen=True)
class Mistake:
    """What people get wrong: a text in the body of a function, by what it is replaced, and why."""

    old: str
    new: str
    says: str

    def made_in(self, source: str, name: str) -> str:
        """The chapter with the mistake in that function, where the text must stand once."""
        first, last = place(functions(ast.parse(source))[name])
        lines = source.splitlines(keepends=True)
        body = "".join(lines[first:last])
        if body.count(self.old) != 1:
            raise ValueError(f"{name}: {self.old!r} stands there {body.count(self.old)} times")
        return "".join(lines[:first]) + body.replace(self.old, self.new) + "".join(lines[last:])
