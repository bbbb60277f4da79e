"""A script: words in, lines out, an exit code that says how it went."""

import os
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any, NoReturn, TextIO

from nanolm.system.config import help_text
from nanolm.system.signals import Stopped, leaving_at_once


def run_script(
    main: Callable[[list[str]], None], usage: str, cls: type, *, several: bool = False
) -> NoReturn:
    """Run a script's main on the command line's words.

    What the user can cause is one line and exit code 2; a signal is one line and 128 + its number.
    several: torchrun may start it as several processes, of which the first one speaks.
    """
    arguments, speaks = sys.argv[1:], not several or is_first()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # no run ends because a terminal lacks a character
            stream.reconfigure(errors="backslashreplace")
    try:
        with (
            leaving_at_once(),
            open(os.devnull, "w") as nowhere,
            redirect_stdout(sys.stdout if speaks else nowhere),
        ):
            if {"-h", "--help"}.intersection(arguments):
                print(f"{usage.strip()}\n\n{help_text(cls)}")
            else:
                main(arguments)
        if sys.stdout:  # it may be closed
            sys.stdout.flush()
    except BrokenPipeError:  # the reader has left, as in `sample.py | head`
        silence(sys.stdout)
        sys.exit(1)
    except (ValueError, OSError) as error:
        sys.exit(complain(error, speaks))
    except (MemoryError, RuntimeError) as error:
        reason = explain(error)
        if reason is None:
            raise
        sys.exit(complain(reason, speaks))
    except Stopped as stop:
        if speaks:
            say(f"\n{stop}")
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


def complain(error: Exception | str, speaks: bool) -> int:
    """Print an error as one line on stderr, and return the exit code for it.

    What all processes raise is said by the first, if there surely is one: torchrun has started it,
    or it has been met (shared). What only one knows of has a note that names it.
    """
    notes = getattr(error, "__notes__", [])
    if speaks or notes or not getattr(error, "shared", "TORCHELASTIC_RUN_ID" in os.environ):
        say(" ".join(["error:", *str(error).splitlines(), *notes]))
    else:  # torchrun ends all as soon as one has ended, and the first one is still to speak
        time.sleep(1)
    return 2


def say(line: str) -> None:
    """Print a line on stderr, if there is anybody to read it."""
    try:
        print(line, file=sys.stderr)
    except OSError:  # its terminal is closed
        silence(sys.stderr)


def silence(stream: TextIO) -> None:
    """Let what is written to a stream, and what could not be, go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Console:
    """A stream that work outlives: where its reader has left, one line on stderr says so.

    notice: what else that line is to say.
    """

    def __init__(self, stream: TextIO, notice: str):
        self.stream, self.notice = stream, notice

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        """Write some text."""
        self._attempt(self.stream.write, text)

    def flush(self) -> None:
        """Let what was written reach the reader."""
        self._attempt(self.stream.flush)

    def _attempt(self, action: Callable, *arguments: str) -> None:
        try:
            action(*arguments)
        except OSError as error:
            silence(self.stream)
            say(f"warning: the output has no reader ({error.strerror}): {self.notice}")
