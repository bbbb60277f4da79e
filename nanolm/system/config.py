"""Configuration: flat keys, each with one default, set by a config file and by --key=value.

Defaults stand in a dataclass, one line per key, with the comment that --help prints. A config file
looks like Python, `key = value` per line, and is data: it is parsed and never executed, so that
nothing in it can do harm, and every mistake in it has a line number.
"""

import argparse
import ast
import difflib
import inspect
import operator
import os
import re
import shlex
import sys
import types
import typing
from collections.abc import Collection, Iterable
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from nanolm.system.files import json_of

LARGEST = sys.float_info.max
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


def read_config_file(
    path: str | Path, known: dict[str, Any], given: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The assignments of a config file: literals, + - * / // on them, and earlier names.

    known: names that count as assigned before its first line. given: those that keep their value
    whatever the file assigns, so that what it computes from them follows. Raises
    FileNotFoundError, or ValueError with the line that is anything else.
    """
    path = Path(path)
    if path.is_dir():
        raise FileNotFoundError(
            f"{path} is a folder, and no config file: give that of a run with "
            f"--out_dir={quoted(path)}, that of a model with --init_from={quoted(path)}"
        )
    if not path.is_file():
        there = ", ".join(sorted(str(p) for p in Path("config").glob("*.py")))
        by_dataset = "dataset" in known and not path.suffix
        raise FileNotFoundError(
            f"no config file {path}"
            + (f"; there are {there}" if there else "")
            + (f"; a dataset is chosen by --dataset={quoted(path)}" if by_dataset else "")
        )
    try:
        tree = ast.parse(path.read_text(encoding="utf-8-sig"))
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        line = getattr(error, "lineno", None) or 1
        reason = getattr(error, "msg", error) or "nested too deeply"
        raise ValueError(
            f"{path}, line {line}: {reason}; a config file holds lines key = value"
        ) from None
    values = {}
    for statement in tree.body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        try:
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement]
            if not all(isinstance(target, ast.Name) for target in targets):
                line = ast.unparse(statement).splitlines()[0]
                raise ValueError(
                    f"{line!r} is not of the form key = value; a config file is data, no program"
                )
            value = value_of(statement.value, {**known, **values, **(given or {})})
            values.update({target.id: value for target in targets})
        except (ValueError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"{path}, line {statement.lineno}: {error}") from None
    return values


def value_of(node: ast.expr, names: dict[str, Any]) -> Any:
    """The value of an expression of literals, names and + - * / //, without running any code."""
    if isinstance(node, ast.Constant) and isinstance(
        node.value, (int, float, str, types.NoneType)
    ):
        return node.value
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = number(value_of(node.operand, names), node)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = value_of(node.left, names), value_of(node.right, names)
        value = OPERATORS[type(node.op)](number(left, node), number(right, node))
        if isinstance(value, int) and abs(value) > LARGEST:  # before it fills the memory
            raise ValueError(f"{ast.unparse(node)!r} is too large")
        return value
    raise ValueError(
        f"{ast.unparse(node)!r} is not allowed: a config file is data, not a program; "
        "use literals, earlier names and + - * / //"
    )


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def number(value: Any, node: ast.expr) -> int | float:
    """The value, if it is a number; node is the expression that is blamed where it is not."""
    if not is_number(value):
        raise ValueError(f"{ast.unparse(node)!r}: {value!r} is not a number")
    return value


def check_key(key: str, cls: type) -> None:
    """Raise ValueError for a key that cls has not, naming those like it, or that speak of it."""
    comments = comments_of(cls)
    if key not in comments:
        near = difflib.get_close_matches(key, comments, n=3, cutoff=0.6)
        speak_of_it = [name for name in comments if key in re.findall(r"\w+", comments[name])]
        names = " or ".join(near or speak_of_it)
        hint = f"did you mean {names}?" if names else "see --help for all keys"
        if key == "config":
            hint = "a config file is named without a key, as in config/pydocs.py"
        raise ValueError(f"unknown key {key!r}: {hint}")


SWITCH = {"true": True, "false": False, "1": True, "0": False}


def from_text(text: str, hint: Any) -> Any:
    """A command-line word as a value of the wanted type, or as it is where it cannot be one."""
    choices = typing.get_args(hint) or (hint,)
    if bool in choices and text.lower() in SWITCH:
        return SWITCH[text.lower()]
    if types.NoneType in choices and (text if str in choices else text.title()) == "None":
        return None
    for kind in (int, float):
        if kind in choices or (kind is float and int in choices):
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def meant(value: Any, *, verbatim: bool) -> Any:
    """What a word stands for: ~ for the home folder.

    One that is verbatim stands for itself; but \\n and \\t, where it has nothing else, for the end
    of a line and a tab, which are hard to type.
    """
    if isinstance(value, tuple):
        return tuple(meant(part, verbatim=verbatim) for part in value)
    if not isinstance(value, str):
        return value
    if not verbatim:
        return os.path.expanduser(value)
    escapes = re.fullmatch(r"(\\[nt])+", value)
    return value.replace(r"\n", "\n").replace(r"\t", "\t") if escapes else value


def quoted(word: object) -> str:
    """A word as one can paste it into a shell, whatever bytes are in it."""
    text = str(word)
    if text.isprintable():
        return shlex.quote(text)
    plain = (chr(b) if chr(b).isalnum() and b < 128 else f"\\{b:03o}" for b in os.fsencode(text))
    return f"$'{''.join(plain)}'"


def coerce(key: str, value: Any, hint: Any) -> Any:
    """The value as the type that the key wants; an int is welcome as a float, 1e3 as an int.

    Raises ValueError naming key, value and what is wanted.
    """
    choices = typing.get_args(hint) or (hint,)
    if typing.get_origin(hint) is tuple:
        choices = (tuple,)
    largest = LARGEST if float in choices else 2**63 - 1
    if is_number(value) and not -largest <= value <= largest:  # so NaN is refused, too
        raise ValueError(f"{key}={value!s:.20}: must be a finite number, at most {largest:.3g}")
    if type(value) in choices:
        return value
    if type(value) is list and tuple in choices:  # JSON has no tuples
        return tuple(value)
    if isinstance(value, float) and value.is_integer() and int in choices:
        return int(value)
    if type(value) is int and float in choices:
        return float(value)
    names = {
        bool: "True or False",
        int: "a whole number",
        float: "a number",
        str: "a text in quotes",
    }
    wanted = " or ".join(names.get(choice, "None") for choice in choices)
    raise ValueError(f"{key}={value!r}: must be {wanted}")


def load_config(cls: type, arguments: Iterable[str], *, positional: Collection[str] = ()) -> Any:
    """Fill a dataclass from its defaults, then config files, then --key=value, later ones winning.

    Words without dashes are config files; or, if positional names keys, the values of these.
    Raises ValueError or FileNotFoundError with one line about what is wrong.
    """
    hints = typing.get_type_hints(cls)
    words, from_line = split_arguments(cls, arguments)
    from_line = {key: coerce(key, value, hints[key]) for key, value in from_line.items()}
    defaults = {field.name: field.default for field in fields(cls)}
    values = {}
    if len(words) > len(positional) > 0:
        wanted = " ".join(positional).upper()
        lists = [f"--{name}" for name in hints if typing.get_origin(hints[name]) is tuple]
        also = f"; more than one goes after {' or '.join(lists)}" if lists else ""
        raise ValueError(f"{words[len(positional)]!r}: only {wanted} goes before any --key{also}")
    if positional:
        values.update(zip(positional, words, strict=False))
    else:
        for path in words:
            values.update(read_keys(path, cls, {**defaults, **values}, from_line))
    values.update(from_line)
    for key, default in defaults.items():
        if default is MISSING and key not in values:
            raise ValueError(
                f"{key.upper()} is missing: it comes first, before any --key; see --help"
            )
    texts = getattr(cls, "texts", ())  # keys whose values are no paths and no names
    values = {key: meant(value, verbatim=key in texts) for key, value in values.items()}
    return cls(**{key: coerce(key, value, hints[key]) for key, value in values.items()})


def read_keys(
    path: str, cls: type, known: dict[str, Any], given: dict[str, Any]
) -> dict[str, Any]:
    """The keys of cls that a config file sets, or that a run's own record (JSON) holds."""
    if path.endswith(".json"):
        recorded = json_of(path)["config"]
        return {key: recorded[key] for key in comments_of(cls) if key in recorded}
    found = read_config_file(path, known, given)
    for key in found:
        try:
            check_key(key, cls)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return found


class Parser(argparse.ArgumentParser):
    """One that raises what it has to say against a command line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def split_arguments(cls: type, arguments: Iterable[str]) -> tuple[list[str], dict[str, Any]]:
    """Command-line words as (words without dashes, {key: value}).

    Raises ValueError for an unknown key or a missing value.
    """
    parser = Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    hints = typing.get_type_hints(cls)
    for field in fields(cls):
        how = {"type": partial(from_text, hint=hints[field.name])}
        if hints[field.name] is bool:
            how |= {"nargs": "?", "const": True}  # a switch may stand alone
        if typing.get_origin(hints[field.name]) is tuple:
            how = {"nargs": "+", "action": "extend"}
        parser.add_argument(f"--{field.name}", **how)
    found, words = parser.parse_known_args(list(arguments))
    for word in words:
        if word.startswith("-"):
            check_key(word.lstrip("-").partition("=")[0], cls)
    lists = {key: tuple(value) for key, value in vars(found).items() if isinstance(value, list)}
    return words, vars(found) | lists


def comments_of(cls: type) -> dict[str, str]:
    """The comment beside each field of a dataclass, with what its choices() says of it."""
    choices = cls.choices() if hasattr(cls, "choices") else {}
    comments = {}
    for owner in [base for base in reversed(cls.__mro__) if "__dataclass_fields__" in vars(base)]:
        for line in inspect.getsource(owner).splitlines():
            if match := re.fullmatch(r"    (\w+): [^=]+?(?: = .+?)?  # (.+)", line):
                key, comment = match.groups()
                listed = f": {' | '.join(choices[key])}" if key in choices else ""
                comments[key] = comment + listed
    return comments


def help_text(cls: type) -> str:
    """One line per key of the dataclass: the comment beside it, and its default."""
    comments, lines = comments_of(cls), []
    for field in fields(cls):
        word = field.default is MISSING
        name = field.name.upper() if word else f"--{field.name}"
        default = "" if word else f" [{field.default!r}]"
        lines.append(f"  {name}".ljust(32) + comments[field.name] + default)
    return "\n".join(lines)
