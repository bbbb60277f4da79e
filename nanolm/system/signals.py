"""Signals: how a program is asked to leave or to save, and when it listens.

A signal arrives between any two instructions. A program that is only reading or preparing leaves
at once: the signal becomes an exception, and everything half-made is taken back on the way out.
A training loop notes the signal instead, finishes its update, and answers then.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress

STOP = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C; a scheduler that wants the machine back
if hasattr(signal, "SIGHUP"):  # not on Windows
    STOP += (signal.SIGHUP,)  # a terminal that is closed, a connection that is lost
SAVE = (signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()
SIGNALS = (*STOP, *SAVE)


class Stopped(KeyboardInterrupt):
    """A signal has asked to leave. Shells expect 128 + its number as the exit code."""

    def __init__(self, number: int, message: str | None = None):
        super().__init__(message or f"stopped by {signal.Signals(number).name}")
        self.number = number


@contextmanager
def handled_by(handler: Callable[[int, object], None], numbers: Collection[int]) -> Iterator[None]:
    """Let handler(number, frame) answer these signals while the block runs.

    Those that are ignored stay ignored: so nohup asks it.
    """
    if threading.current_thread() is not threading.main_thread():  # only this one may decide
        yield
        return
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old or signal.SIG_DFL)


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Turn the first signal to stop into Stopped, and leave those to save unanswered."""

    def leave(number, frame):
        for other in STOP[1:]:  # nothing but a second Ctrl-C disturbs the way out
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    with handled_by(leave, STOP), handled_by(lambda *_: None, SAVE):
        yield


class Signals(set):
    """The signals that came and wait for an answer."""

    def take(self) -> set[int]:
        """Those that came since the last call."""
        taken = self.copy()
        self.difference_update(taken)
        return taken


@contextmanager
def collecting(*, say: bool) -> Iterator[Signals]:
    """Only note the signals that come while the block runs; but a second Ctrl-C leaves at once.

    say: answer the first ones with a line on stderr.
    """
    signals = Signals()

    def note(number, frame):
        signals.add(number)
        if number == signal.SIGINT:  # the next needs no Python, which may be waiting for a GPU
            signal.signal(number, signal.SIG_DFL)
        if say and sys.stderr and number in STOP:
            again = " (Ctrl-C again leaves at once)" if number == signal.SIGINT else ""
            line = f"\n{signal.Signals(number).name}: finishing this step, then saving{again}\n"
            with suppress(OSError):  # print would fail where it interrupts another print
                os.write(sys.stderr.fileno(), line.encode())

    with handled_by(note, SIGNALS):
        yield signals
