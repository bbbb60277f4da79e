"""Laws of signals: a run that is asked to leave or to save loses nothing, whenever it is asked.

A child sends the signal to itself where a chosen function is called for the nth time, so that it
comes at exactly that moment. Whatever happens then, the run that goes on has to end as the one
that nobody disturbed, to the last bit.
"""

import contextlib
import functools
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from children import end, run_train, start, start_ranks
from conftest import ROOT, TINY
from outcomes import outcome

import prepare
from nanolm import training
from nanolm.runs import run
from nanolm.runs import start as run_start
from nanolm.runs.checkpoint import load, step_files, step_of
from nanolm.runs.log import read_metrics
from nanolm.system import signals
from nanolm.system.script import Console, run_script
from nanolm.system.signals import STOP, Stopped, collecting, leaving_at_once
from nanolm.text import data

SIGINT, SIGTERM, SIGHUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
SIGUSR1 = signal.SIGUSR1
RUN = Path("out", "x")
FLAGS = [*TINY, "--out_dir=out/x", "--dropout=0.1", "--gradient_accumulation_steps=2"]
FLAGS += ["--max_iters=8", "--eval_interval=4", "--keep_checkpoints=9"]
AUTO = [*FLAGS, "--init_from=auto"]

# What a run does at each moment: one call of this function. Each process trains and evaluates;
# at the others, process 0 is busy and the others wait for it.
MOMENTS = {
    "start-up": (run_start, "find_dataset"),
    "update": (training, "target_shares"),
    "evaluation": (run, "evaluate"),  # twice: one for each split
    "sample": (run, "takewhile"),
    "save": (torch, "save"),
}
OF_THE_FIRST = ("start-up", "sample", "save")

# ------------------------------------------------------------------------------------------
# In the children


def rank() -> int:
    return int(os.environ["RANK"])


def train_disturbed(moment: str, call: int, act: Callable[[str], None], *arguments: str) -> None:
    """Do what train.py does; but before the given call of the moment's function, act(moment)."""
    Path(f"pid{rank()}").write_text(str(os.getpid()))
    module, name = MOMENTS[moment]
    function, calls = getattr(module, name), itertools.count(1)

    def disturbed(*args, **kwargs):
        if next(calls) == call:
            act(moment)
        return function(*args, **kwargs)

    setattr(module, name, disturbed)
    run_train(*arguments)


def send(number: int, ranks: tuple[int, ...], moment: str) -> None:
    """Let these processes have the signal, this one last."""
    if moment not in OF_THE_FIRST:
        ranks = {rank()}.intersection(ranks)
    elif rank() > 0:  # they come to their own start-up later
        ranks = ()
    for i in sorted(ranks, key=lambda i: i == rank()):
        os.kill(int(Path(f"pid{i}").read_text()), number)


def lose_console(number: int | None, moment: str) -> None:
    """Close the terminal of this process, and send the signal; without one, close its pipe."""
    there, here = os.pipe() if number is None else os.openpty()
    for stream in (1, 2):
        os.dup2(here, stream)
    for end_of_it in (here, there):
        os.close(end_of_it)
    if number:
        os.kill(os.getpid(), number)


def be_busy_after_ctrl_c(moment: str) -> None:
    """Get the first Ctrl-C, and compute for minutes without a look at signals."""
    os.kill(os.getpid(), SIGINT)
    if rank() == 0:
        Path("busy").touch()
        sum(range(10**11))


def die(number: int | None, of: int, moment: str) -> None:
    """In the first life of a process, end it at once: by a signal, or by itself."""
    if rank() == of and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if number is None:
            os._exit(1)
        os.kill(os.getpid(), number)


def train_in_life(life: int, *arguments: Any) -> None:
    """train_disturbed in a process that torchrun has started again so many times."""
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(life)
    os.environ["TORCHELASTIC_RUN_ID"] = "the same in all lives"
    train_disturbed(*arguments)


def prepare_disturbed(number: int) -> None:
    """Do what prepare.py does; but before the text is encoded, send the signal."""
    encode = data.encode_corpus

    def disturbed(*args, **kwargs):
        os.kill(os.getpid(), number)
        return encode(*args, **kwargs)

    data.encode_corpus = disturbed
    sys.argv = ["prepare.py", "other", "--input=text.txt", "--overwrite=true"]
    run_script(prepare.main, "", prepare.PrepareConfig)


# ------------------------------------------------------------------------------------------
# Runs and what they leave


@pytest.fixture(scope="module")
def undisturbed(trained_place, tmp_path_factory) -> Callable[..., dict]:
    """undisturbed(n, *keys) -> what a run of n processes leaves where nothing happens to it."""

    @functools.cache
    def outcome_of(n: int, *keys: str) -> dict:
        place = tmp_path_factory.mktemp("undisturbed")
        shutil.copytree(trained_place, place, dirs_exist_ok=True)
        with contextlib.chdir(place):
            assert end(*start_ranks(n, run_train, *AUTO, *keys)) == [0] * n
            return outcome(RUN)

    return outcome_of


def said_by(n: int) -> str:
    """What the first of n processes has said; the others are silent."""
    assert [Path(f"log{i}.txt").read_text() for i in range(1, n)] == [""] * (n - 1)
    return Path("log0.txt").read_text()


def goodbye(number: int, step: int) -> str:
    """The line with which a run leaves that has a checkpoint."""
    path = RUN / f"step_{step:08d}.pt"
    way = "continue with python train.py --out_dir=out/x --init_from=resume"
    return f"\nstopped by {number.name}; the last checkpoint is {path}: {way}\n"


def all_files() -> dict[Path, int]:
    """All files of datasets and runs, and when they were last written; and their folders."""
    paths = itertools.chain(Path("data").rglob("*"), Path("out").rglob("*"))
    return {path: path.is_file() and path.stat().st_mtime_ns for path in paths}


def wait_until(condition: Callable[[], Any], timeout: float = 120) -> None:
    end_of_patience = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end_of_patience, f"waited for {timeout} s"
        time.sleep(0.02)


names = partial(pytest.mark.parametrize, ids=lambda value: getattr(value, "name", None))
every_signal = names("number", [SIGTERM, SIGINT, SIGUSR1])
every_n = pytest.mark.parametrize("n", [1, 2])
signals_and_ns = names(
    ("number", "n"),
    [
        *((number, 1) for number in (SIGTERM, SIGINT, SIGUSR1)),
        (SIGTERM, 2),
        pytest.param(SIGINT, 2, marks=pytest.mark.long),
        pytest.param(SIGUSR1, 2, marks=pytest.mark.long),
    ],
)

# ------------------------------------------------------------------------------------------
# One signal


@every_n
@every_signal
def test_at_start_up_a_run_leaves_at_once_and_writes_nothing(number, n, tiny_run, undisturbed):
    """Though the other processes wait for the first one. To save, there is nothing yet."""
    before = all_files()
    act = partial(send, number, tuple(range(n)))
    codes = end(*start_ranks(n, train_disturbed, "start-up", 1, act, *AUTO))
    if number == SIGUSR1:
        assert codes == [0] * n
        assert outcome(RUN) == undisturbed(n)
    else:
        assert codes[0] == 128 + number
        assert {*codes[1:]} <= {
            128 + number,
            -number,
        }  # who still waits to meet the first just ends
        assert said_by(n).endswith(f"\nstopped by {number.name}\n")
        assert all_files() == before


@every_n
@every_signal
@pytest.mark.parametrize(
    ("moment", "call", "left_at", "saved_at"),
    [("update", 3, 3, 3), ("evaluation", 3, 4, 5), ("sample", 2, 4, 5), ("save", 1, 5, 5)],
)
def test_a_signal_is_answered_after_the_update_or_in_the_evaluation(
    number, moment, call, left_at, saved_at, n, tiny_run, undisturbed
):
    """By all processes alike, whether one of them has got it or all. Nothing is lost, and nothing
    shows in the end.
    """
    step = saved_at if number == SIGUSR1 else left_at
    act = partial(send, number, tuple(range(n)) if number == SIGINT else (n - 1,))
    codes = end(*start_ranks(n, train_disturbed, moment, call, act, *AUTO))
    said = said_by(n)
    assert (RUN / f"step_{step:08d}.pt") in step_files(RUN)
    if number == SIGUSR1:
        assert codes == [0] * n
    else:
        assert codes == [128 + number] * n
        assert said.endswith(goodbye(number, step))
        assert end(*start_ranks(n, run_train, *AUTO)) == [0] * n
    assert said.count(f"saved     step {step} in out/x\n") == 1
    assert outcome(RUN) == undisturbed(n)


@pytest.mark.parametrize("layout", ["--shard=true", "--tensor_parallel=2"])
@pytest.mark.parametrize(("moment", "call", "step"), [("update", 3, 3), ("evaluation", 3, 4)])
def test_a_signal_is_answered_in_every_layout(moment, call, step, layout, tiny_run, undisturbed):
    act = partial(send, SIGTERM, (1,))
    codes = end(*start_ranks(2, train_disturbed, moment, call, act, *AUTO, layout))
    assert codes == [128 + SIGTERM] * 2
    assert said_by(2).endswith(goodbye(SIGTERM, step))
    assert end(*start_ranks(2, run_train, *AUTO, layout)) == [0, 0]
    assert outcome(RUN) == undisturbed(2, layout)


@signals_and_ns
def test_a_signal_in_the_last_evaluation_leaves_only_that_to_do(number, n, tiny_run, undisturbed):
    act = partial(send, number, tuple(range(n)))
    codes = end(*start_ranks(n, train_disturbed, "evaluation", 5, act, *AUTO))
    said = said_by(n)
    if number == SIGUSR1:
        assert codes == [0] * n
        assert "saved" not in said
    else:
        assert codes == [128 + number] * n
        assert said.endswith(goodbye(number, 8))
        assert end(*start_ranks(n, run_train, *AUTO)) == [0] * n
        assert "| loss" not in said_by(n).removeprefix(said)
    assert outcome(RUN) == undisturbed(n)


@signals_and_ns
def test_where_an_evaluation_is_due_the_answer_comes_first(number, n, tiny_run, undisturbed):
    """An evaluation can take minutes, and a scheduler gives seconds. The run that goes on makes up
    for it.
    """
    act = partial(send, number, (0,))
    codes = end(*start_ranks(n, train_disturbed, "update", 4, act, *AUTO))
    said = said_by(n)
    if number == SIGUSR1:
        assert codes == [0] * n
    else:
        assert codes == [128 + number] * n
        assert load(RUN / "step_00000004.pt")["evaluated"] == 0
        assert not (RUN / "best.pt").exists()
        assert end(*start_ranks(n, run_train, *AUTO)) == [0] * n
        said += said_by(n).removeprefix(said)
    assert said.index("saved     step 4 in") < said.index("step      4 | train loss")
    kinds = [(row["step"], "loss" in row) for row in read_metrics(RUN / "metrics.jsonl")]
    assert sorted(set(kinds)) == sorted(kinds)
    assert outcome(RUN) == undisturbed(n)


# ------------------------------------------------------------------------------------------
# Nobody reads any more


@pytest.mark.parametrize(("moment", "call"), [("start-up", 1), ("update", 3), ("evaluation", 3)])
@names(("number", "n"), [(SIGHUP, 1), (None, 1), (None, 2)])
def test_a_run_outlives_its_console(number, n, moment, call, tiny_run, undisturbed):
    """SIGHUP stops it as SIGTERM does, though its terminal cannot be written to any more; without
    its reader, as in `| head`, it goes on. It once ended with all since its last checkpoint lost.
    """
    act = partial(lose_console, number)
    codes = end(*start_ranks(n, train_disturbed, moment, call, act, *AUTO))
    assert codes == [128 + SIGHUP if number else 0] * n
    if number:
        saved = {"start-up": [], "update": [3], "evaluation": [4]}[moment]
        assert [step_of(path) for path in step_files(RUN)] == saved
        assert end(*start_ranks(n, run_train, *AUTO)) == [0] * n
    assert outcome(RUN) == undisturbed(n)


def test_a_reader_that_has_left_is_told_of_once(capfd):
    there, here = os.pipe()
    os.close(there)
    with open(here, "w") as stream, contextlib.redirect_stdout(Console(stream, "all is well")):
        for _ in range(3):
            print("a line", flush=True)
    said = "warning: the output has no reader (Broken pipe): all is well\n"
    assert capfd.readouterr() == ("", said)


# ------------------------------------------------------------------------------------------
# A second Ctrl-C


@pytest.mark.parametrize(
    ("moment", "call", "n"), [("update", 6, 1), ("update", 6, 2), ("save", 2, 1)]
)
def test_a_second_ctrl_c_ends_what_python_cannot_interrupt(moment, call, n, tiny_run, undisturbed):
    """A long computation in C, or the wait for another process. The checkpoints stay sound."""
    ranks = start_ranks(n, train_disturbed, moment, call, be_busy_after_ctrl_c, *AUTO)
    wait_until(Path("busy").exists)
    time.sleep(0.1)
    for child in ranks:
        os.kill(child.pid, SIGINT)
    assert end(*ranks, timeout=10) == [-SIGINT] * n
    assert said_by(n).endswith(
        "SIGINT: finishing this step, then saving (Ctrl-C again leaves at once)\n"
    )
    assert end(*start_ranks(n, run_train, *AUTO)) == [0] * n
    assert outcome(RUN) == undisturbed(n)


# ------------------------------------------------------------------------------------------
# Preparing


@pytest.mark.parametrize("old", [False, True], ids=["new", "again"])
@names("number", [SIGTERM, SIGINT])
def test_prepare_leaves_at_once_and_takes_back_what_it_has_begun(number, old, tiny_run):
    """A dataset that was there before stays."""
    if old:
        shutil.copytree("data/tiny", "data/other")
    before = all_files()
    assert end(start(prepare_disturbed, number)) == [128 + number]
    said = "preparing data/other from text.txt\n"
    assert Path("log.txt").read_text() == f"{said}\nstopped by {number.name}\n"
    assert all_files() == before


# ------------------------------------------------------------------------------------------
# The ways to answer


def handlers() -> dict:
    """What answers each signal now."""
    return {number: signal.getsignal(number) for number in signals.SIGNALS}


@pytest.fixture
def came() -> Iterator[list[int]]:
    """The signals that reach whoever is outside of all blocks."""
    numbers = []
    with signals.handled_by(lambda number, frame: numbers.append(number), signals.SIGNALS):
        yield numbers


def leave(block: Callable, *, by: type[BaseException] | None) -> None:
    """Enter a block and leave it again, by an exception or at its end."""
    with block():
        if by:
            raise by


BLOCKS = [leaving_at_once, partial(collecting, say=False)]
BLOCKS += [partial(signals.handled_by, print, signals.SIGNALS)]
every_block = pytest.mark.parametrize(
    "block", BLOCKS, ids=lambda block: getattr(block, "func", block).__name__
)


@every_block
@pytest.mark.parametrize("by", [None, ValueError, KeyboardInterrupt, SystemExit])
def test_every_block_puts_back_what_answered_before(block, by, came):
    before = handlers(), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with pytest.raises(by) if by else contextlib.nullcontext():
        leave(block, by=by)
    assert (handlers(), signal.pthread_sigmask(signal.SIG_BLOCK, ())) == before


@every_block
def test_in_another_thread_a_block_does_nothing(block, came):
    """Python lets only the main thread set handlers."""
    before, inside = handlers(), []

    def work():
        with block():
            inside.append((handlers(), signal.pthread_sigmask(signal.SIG_BLOCK, ())))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [(before, set())]


@names("number", STOP)
def test_leaving_at_once_turns_signals_to_stop_into_an_exception(number, came):
    with pytest.raises(Stopped, match=f"^stopped by {number.name}$") as stopped, leaving_at_once():
        list(map(signal.raise_signal, (SIGUSR1, number)))
    assert stopped.value.number == number
    assert isinstance(stopped.value, KeyboardInterrupt)  # no `except Exception` swallows it
    assert came == []


@names("number", STOP)
def test_a_second_signal_does_not_disturb_the_way_out(number, came):
    """Who is asked twice, as some schedulers do, still takes back what was begun."""
    tidied = []

    def work():
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(SIGTERM)
            tidied.append(True)

    with pytest.raises(Stopped), leaving_at_once():
        work()
    assert tidied
    assert came == []


def test_what_nohup_ignores_stays_ignored(came):
    signal.signal(SIGHUP, signal.SIG_IGN)
    for block in BLOCKS:
        with block():
            signal.raise_signal(SIGHUP)
    assert signal.getsignal(SIGHUP) == signal.SIG_IGN
    assert came == []


def test_noting_only_notes(came, capfd):
    with collecting(say=False) as signals_here:
        assert signals_here.take() == set()
        for number in (SIGTERM, SIGUSR1, SIGTERM):
            signal.raise_signal(number)
        assert signals_here.take() == {SIGTERM, SIGUSR1}
        assert signals_here.take() == set()
        signal.raise_signal(SIGINT)
        assert signal.getsignal(SIGINT) == signal.SIG_DFL
        assert signals_here.take() == {SIGINT}
    assert came == []
    assert capfd.readouterr() == ("", "")


def test_noting_says_what_will_come(capfd):
    lines = []
    for number, way in ((SIGTERM, ""), (SIGINT, " (Ctrl-C again leaves at once)")):
        with collecting(say=True):
            signal.raise_signal(SIGUSR1)
            signal.raise_signal(number)
        lines.append(f"\n{number.name}: finishing this step, then saving{way}\n")
    assert capfd.readouterr().err == "".join(lines)


# ------------------------------------------------------------------------------------------
# Under torchrun


@contextlib.contextmanager
def torchrun(*arguments: str) -> Iterator[subprocess.Popen]:
    """Two processes of a script, as a user starts them; what they print goes to log.txt."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node=2", "--monitor-interval=0.1", *arguments]
    paths = {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", Path(__file__).parent)))
    }
    with open("log.txt", "w") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, **paths, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_torchrun_passes_signals_on_and_its_run_goes_on(tiny_run):
    """SIGUSR1 to one of the workers saves; SIGTERM to torchrun itself stops all."""
    flags = [*AUTO, "--eval_interval=1000000", "--log_interval=1", "--lr_decay_iters=100000"]
    log = Path("log.txt")
    with torchrun(str(ROOT / "train.py"), *flags, "--max_iters=1000000") as process:
        wait_until(lambda: "step      1 | loss" in log.read_text())
        find = ["pgrep", "-P", str(process.pid), "-f", "train.py"]
        workers = subprocess.run(find, capture_output=True, text=True, check=True).stdout.split()
        assert len(workers) == 2
        os.kill(int(workers[1]), SIGUSR1)
        wait_until(lambda: re.search(r"saved .* in out/x\n", log.read_text()))
        process.terminate()
        process.wait(25)  # torchrun would kill after 30
    said, steps = log.read_text(), [step_of(path) for path in step_files(RUN)]
    assert len(steps) == 2
    for step in steps:
        assert said.count(f"saved     step {step} in out/x") == 1
    assert said.count("\nSIGTERM: finishing this step") == 1
    assert said.count(goodbye(SIGTERM, steps[1]).strip()) == 1
    flags += [f"--max_iters={steps[1] + 9}"]
    outcomes = []
    for _ in range(2):
        assert end(*start_ranks(2, run_train, *flags)) == [0, 0]
        outcomes.append(outcome(RUN))
        shutil.rmtree(RUN)
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(
    ("moment", "call", "of", "number", "keys"),
    [
        ("update", 6, 1, signal.SIGKILL, ["--shard=true"]),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in [
                ("update", 6, 1, signal.SIGKILL, []),
                ("update", 1, 0, None, []),
                ("update", 1, 1, signal.SIGKILL, []),
                ("update", 6, 0, signal.SIGKILL, []),
                ("update", 6, 0, signal.SIGKILL, ["--tensor_parallel=2"]),
                ("update", 8, 1, None, []),
                ("save", 2, 0, signal.SIGKILL, ["--shard=true"]),
                ("evaluation", 5, 1, None, []),
            ]
        ),
    ],
)
def test_a_run_that_torchrun_starts_again_ends_as_if_nothing_had_happened(
    moment, call, of, number, keys, tiny_run, undisturbed
):
    """A process dies; the others notice and leave; torchrun starts all again, with the words that
    began the run; and they go on from its last checkpoint.
    """
    Path("script.py").write_text(
        "import sys\n"
        "from functools import partial\n"
        "from nanolm.runs import pictures\n"
        "from test_signals import die, train_disturbed\n"
        "pictures.draw_losses = lambda *_, **__: False\n"
        f"act = partial(die, {number and int(number)}, {of})\n"
        f"train_disturbed({moment!r}, {call}, act, *sys.argv[1:])\n"
    )
    with torchrun("--max-restarts=2", "script.py", *FLAGS, *keys) as process:
        assert process.wait(300) == 0, Path("log.txt").read_text()
    said = Path("log.txt").read_text()
    assert ("resumed at step 4" in said) == (call > 1)
    assert said.count("run       out/x, ") == 2
    assert outcome(RUN) == undisturbed(2, *keys)


@pytest.mark.parametrize(("moment", "call"), [("start-up", 1), ("update", 2), ("update", 6)])
def test_a_run_that_replaces_another_is_not_mistaken_for_it_when_started_again(
    moment, call, tiny_run, undisturbed
):
    """Wherever it died first: before it had removed the other one's checkpoints, or after."""
    other = ["--learning_rate=0.1", "--seed=3"]
    assert end(start(run_train, *FLAGS, *other)) == [0]
    act = partial(die, signal.SIGKILL, 0)
    words = (moment, call, act, *FLAGS, "--overwrite=true")
    codes = [end(*start_ranks(2, train_in_life, life, *words)) for life in (0, 1)]
    assert codes[0][0] == -signal.SIGKILL
    assert codes[1] == [0, 0]
    assert outcome(RUN) == undisturbed(2)


def test_a_run_that_is_refused_is_refused_when_started_again(tiny_run):
    """Without this, --max-restarts continued an older run with the words of another one."""
    assert end(start(run_train, *FLAGS)) == [0]
    before = all_files()
    for life in (0, 1):
        words = (life, "update", 1, partial(die, None, 9), *FLAGS, "--max_iters=9")
        assert end(*start_ranks(2, train_in_life, *words)) == [2, 2]
        assert "out/x already holds a run" in said_by(2)
    assert all_files() == before
