"""Configuration: flat keys, each with one default, set by a config file and by --key=value.

Defaults stand in a dataclass, one line per key, with the comment that --help prints. A config file
looks like Python, `key = value` per line, and is data: it is parsed and never executed, so that
nothing in it can do harm, and every mistake in it has a line number.
"""

import ast
import difflib
import inspect
import operator
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable
from contextlib import redirect_stdout
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NoReturn

from nanolm.system.signals import Stopped, leaving_at_once

LARGEST = sys.float_info.max
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


def read_config_file(path: str | Path, known: dict[str, Any]) -> dict[str, Any]:
    """The assignments of a config file: literals, + - * / // on them, and earlier names.

    known: names that count as assigned before its first line. Raises FileNotFoundError, or
    ValueError with the line that is anything else.
    """
    path = Path(path)
    if not path.is_file():
        there = ", ".join(sorted(str(p) for p in Path("config").glob("*.py")))
        raise FileNotFoundError(
            f"no config file {path}" + (f"; there are {there}" if there else "")
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
                raise ValueError(f"{line!r} is not of the form key = value")
            value = value_of(statement.value, {**known, **values})
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


def split_arguments(
    arguments: Iterable[str], hints: dict[str, Any]
) -> tuple[list[str], dict[str, Any]]:
    """Command-line words as (positional words, {key: value}), for --key=value and --key value.

    A switch may stand alone (--overwrite), and a key that takes several values takes all words up
    to the next key. Raises ValueError for an unknown key or a missing value.
    """
    words, positional, values = list(arguments), [], {}
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            positional.append(word)
            continue
        key, equals, value = word[2:].partition("=")
        check_key(key, hints)
        several = typing.get_origin(hints[key]) is tuple
        if several:
            found = [value] if equals else []
            while words and not words[0].startswith("--"):
                found.append(words.pop(0))
            value = (*values.get(key, ()), *found)
        elif not equals and hints[key] is bool:
            value = words.pop(0) if words and words[0].lower() in SWITCH else "True"
        elif not equals:
            if not words or words[0].startswith("--"):
                raise ValueError(f"--{key} needs a value: --{key}=VALUE")
            value = words.pop(0)
        values[key] = value if several else from_text(value, hints[key])
    return positional, values


def check_key(key: str, known: Iterable[str]) -> None:
    """Raise ValueError for a key that is not known, with the names nearest to it."""
    if key not in known:
        near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}?" if near else "see --help for all keys"
        raise ValueError(f"unknown key {key!r}: {hint}")


SWITCH = {"true": True, "false": False, "1": True, "0": False}


def from_text(text: str, hint: Any) -> Any:
    """A command-line word as a value of the wanted type, or as it is where it cannot be one."""
    choices = typing.get_args(hint) or (hint,)
    if bool in choices and text.lower() in SWITCH:
        return SWITCH[text.lower()]
    if types.NoneType in choices and text.lower() == "none":
        return None
    for kind in (int, float):
        if kind in choices or (kind is float and int in choices):
            try:
                return kind(text)
            except ValueError:
                continue
    return text


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
    words, from_line = split_arguments(arguments, hints)
    defaults = {field.name: field.default for field in fields(cls)}
    values = {}
    if positional and len(words) > len(positional):
        wanted = " ".join(positional).upper()
        raise ValueError(f"{words[len(positional)]!r}: only {wanted} is wanted, before any --key")
    if positional:
        values.update(zip(positional, words, strict=False))
    else:
        for path in words:
            found = read_config_file(path, {**defaults, **values})
            for key in found:
                try:
                    check_key(key, hints)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from None
            values.update(found)
    values.update(from_line)
    missing = [
        key for key, default in defaults.items() if default is MISSING and key not in values
    ]
    if missing:
        raise ValueError(f"{missing[0].upper()} is missing; see --help")
    return cls(**{key: coerce(key, value, hints[key]) for key, value in values.items()})


def help_text(cls: type) -> str:
    """One line per key of the dataclass: the comment beside it, and its default."""
    entries, defaults = {}, {field.name: field.default for field in fields(cls)}
    for owner in [base for base in reversed(cls.__mro__) if "__dataclass_fields__" in vars(base)]:
        for line in inspect.getsource(owner).splitlines():
            if match := re.fullmatch(r"    (\w+): [^=]+?(?: = .+?)?  # (.+)", line):
                key, comment = match.groups()
                default = defaults[key]
                name = key.upper() if default is MISSING else f"--{key}"  # a word without dashes
                entries[name] = comment + ("" if default is MISSING else f" [{default!r}]")
    return "\n".join(f"  {name}".ljust(32) + entry for name, entry in entries.items())


def run_script(main: Callable[[list[str]], None], usage: str, cls: type) -> NoReturn:
    """Run a script's main on the command line's words.

    What the user can cause is one line and exit code 2; a signal is one line and 128 + its number.
    Of several processes that torchrun has started, the first one speaks.
    """
    arguments = sys.argv[1:]
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # no run ends because a terminal lacks a character
            stream.reconfigure(errors="backslashreplace")
    try:
        with (
            leaving_at_once(),
            open(os.devnull, "w") as nowhere,
            redirect_stdout(sys.stdout if is_first() else nowhere),
        ):
            if {"-h", "--help"}.intersection(arguments):
                print(f"{usage.strip()}\n\n{help_text(cls)}")
            else:
                main(arguments)
        if sys.stdout:  # it may be closed
            sys.stdout.flush()
    except BrokenPipeError:  # the reader has left, as in `sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        sys.exit(complain(error))
    except (MemoryError, RuntimeError) as error:
        reason = explain(error)
        if reason is None:
            raise
        sys.exit(complain(reason))
    except Stopped as stop:
        if is_first():
            print(f"\n{stop}", file=sys.stderr)
        sys.exit(128 + stop.number)
    sys.exit(0)


def is_first() -> bool:
    """Whether torchrun, if it has started this process, has started it as the first one."""
    return os.environ.get("RANK", "0") == "0" or "WORLD_SIZE" not in os.environ


def explain(error: Exception) -> str | None:
    """What to do about an error that lies in the machine; None for one that lies in the code."""
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile fails here ({str(error).splitlines()[0]}); use --compile=false"
    # Python's, a CPU's or a GPU's allocator, or a tensor's size in bytes gave out
    out = isinstance(error, MemoryError) or "memory" in str(error) or "Storage size" in str(error)
    return f"out of memory: make the batch or the model smaller ({error})" if out else None


def complain(error: Exception | str) -> int:
    """Print an error as one line on stderr, and return the exit code for it.

    What all processes raise is said by the first; what only one knows of has a note that names it.
    """
    notes = getattr(error, "__notes__", [])
    if is_first() or notes:
        print(" ".join(["error:", *str(error).splitlines(), *notes]), file=sys.stderr)
    return 2
