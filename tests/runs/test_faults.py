"""Laws of runs that are killed, damaged or out of room: they end as if nothing had been.

A process that is killed leaves what it has told the system until then. os._exit, which cleans up
nothing, shows this after each single file operation; SIGKILL at moments that nobody has chosen.
What a loss of power leaves can only be told from the order of the operations.
"""

import errno
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from children import end, run_train, start
from conftest import ROOT, TINY
from outcomes import frozen, outcome

from nanolm.runs import checkpoint
from nanolm.runs.load import check_fits
from nanolm.system import files
from nanolm.training import update
from train import main

SAVES, KEEP = 10, 2
TEN_SAVES = [
    *TINY,
    f"--max_iters={SAVES}",
    "--eval_interval=1",
    "--sample_tokens=2",
    "--dropout=0.2",
    f"--keep_checkpoints={KEEP}",
    "--init_from=auto",
]
SPREAD = 12  # points at which a run of ten saves is killed, beside one of each kind
EIGHT_UPDATES = [
    "--log_interval=1",
    "--dropout=0.2",
    "--max_iters=8",
    "--lr_decay_iters=8",
    "--keep_checkpoints=9",
]


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """Drawing takes longer than these runs."""
    monkeypatch.setattr("nanolm.runs.pictures.draw_losses", lambda *_, **__: False)


def assert_tidy(folder: str | Path, *, keep: int, also: tuple[str, ...] = ()) -> None:
    """Nothing is in a run's folder but what belongs there."""
    steps = {path.name for path in checkpoint.step_files(folder)}
    assert len(steps) <= keep
    belongs = {"run.json", "nanolm_tokenizer.json", "metrics.jsonl", checkpoint.BEST, *also}
    assert {path.name for path in Path(folder).iterdir()} == belongs | steps


def train(*arguments: str) -> None:
    """Do in this process what `python train.py` does with these changes of the tiny run."""
    main([*TINY, "--out_dir=out/x", *arguments])


class Wrapped:
    """An open file; what a subclass does not define is done as ever."""

    def __init__(self, file: io.IOBase):
        self.file = file

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


# ------------------------------------------------------------------------------------------
# Killed after a file operation


class Watched(Wrapped):
    """A file that notes what is done to it."""

    def __init__(self, file: io.IOBase, note: Callable[[str], None]):
        super().__init__(file)
        self.note = note

    def write(self, data) -> int:
        n = self.file.write(data)
        self.note("write")
        return n

    def flush(self) -> None:
        self.file.flush()
        self.note("flush")

    def __exit__(self, *_):
        self.file.close()
        self.note("close")


def watch(folder: Path, *, fatal: int | None = None) -> list[tuple[str, ...]]:
    """Note from here on what this process does to the folder: (operation, names of files).

    Right after operation number fatal, from 1, the process ends and cleans up nothing.
    """
    done, opened = [], {}

    def note(operation, *paths):
        if any(folder in (Path(path), Path(path).parent) for path in paths):
            done.append((operation, *(Path(path).name for path in paths)))
            if len(done) == fatal:
                os._exit(9)

    def watched(name):
        function = getattr(os, name)

        def call(*arguments, **options):
            result = function(*arguments, **options)
            if name == "open":
                opened[result] = arguments[0]
            elif name == "fsync":
                note(name, opened[arguments[0]])
            else:
                note(name, *(path for path in arguments if not isinstance(path, int)))
            return result

        return call

    def open_watched(path, mode="r", **options):
        file = open(path, mode, **options)  # noqa: SIM115
        opened[file.fileno()] = path
        if mode != "rb":
            note("open", path)
        return Watched(file, lambda operation: note(operation, path))

    for name in ("open", "fsync", "replace", "link", "unlink", "mkdir", "rmdir"):
        setattr(os, name, watched(name))
    files.open = open_watched
    return done


def note_operations(folder: str) -> None:
    """Make a run of ten saves, and write operations.json."""
    done = watch(Path(folder))
    try:
        run_train(*TEN_SAVES, f"--out_dir={folder}")
    finally:
        Path("operations.json").write_text(json.dumps(done))


def train_until(fatal: int, folder: str) -> None:
    watch(Path(folder), fatal=fatal)
    run_train(*TEN_SAVES, f"--out_dir={folder}")


def fork(function: Callable, *arguments: object, log: str) -> int:
    """Call the function in a process of its own, which prints to log; its number."""
    number = os.fork()
    if number == 0:
        try:
            with open(log, "ab") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            function(*arguments)
        except SystemExit as leaving:
            os._exit(leaving.code)
        finally:
            os._exit(70)
    return number


def wait(number: int) -> int:
    """The exit code of a process, minus the signal's number if it was killed by one."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def kill_and_recover(points: list[int]) -> None:
    """Kill a run at each of the points, and let another process finish it; prints exit codes."""
    for point in points:
        folder = f"out/{point}"
        killed = wait(fork(train_until, point, folder, log="killed.txt"))
        finished = wait(fork(run_train, *TEN_SAVES, f"--out_dir={folder}", log=f"{point}.txt"))
        print(point, killed, finished)


def choose_points(operations: list[list[str]], n: int) -> list[int]:
    """The first operation of each kind on each kind of file, and n evenly spread over all."""
    kinds = {}
    for point, operation in enumerate(operations, start=1):
        kinds.setdefault(re.sub(r"\d+", "", " ".join(operation)), point)
    spread = {round(i * (len(operations) - 1) / (n - 1)) + 1 for i in range(n)}
    return sorted(spread.union(kinds.values()))


@pytest.fixture(scope="module")
def watched_place(trained_place, tmp_path_factory) -> Path:
    """A folder with data/tiny, out/whole, a run of ten saves, and its operations.json."""
    place = tmp_path_factory.mktemp("watched")
    shutil.copytree(trained_place, place, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert end(start(note_operations, "out/whole")) == [0], Path("log.txt").read_text()
    return place


@pytest.fixture
def operations(watched_place, workplace) -> list[list[str]]:
    """The operations of a run of ten saves, which is out/whole below the current folder."""
    shutil.copytree(watched_place, workplace, dirs_exist_ok=True)
    return json.loads(Path("operations.json").read_text())


@pytest.mark.parametrize("n", [SPREAD, pytest.param(500, marks=pytest.mark.long)])
def test_a_run_killed_after_any_file_operation_ends_as_if_nothing_had_been(n, operations):
    """It goes on from the newest step, and the next process tidies up."""
    points = choose_points(operations, n)
    assert len(points) >= 50
    halves = [start(kill_and_recover, points[i::2], log=f"codes{i}.txt") for i in (0, 1)]
    assert end(*halves, timeout=60 * len(points)) == [0, 0]
    codes = "".join(Path(f"codes{i}.txt").read_text() for i in (0, 1)).splitlines()
    said = {point: Path(f"{point}.txt").read_text() for point in points}
    failed = [point for point in points if f"{point} 9 0" not in codes]
    assert not failed, [(operations[point - 1], said[point]) for point in failed]
    whole, n_saved = outcome("out/whole"), 0
    for point, (operation, *names) in enumerate(operations, start=1):
        n_saved += operation == "replace" and names[-1].startswith("step_")
        if point in said:
            resumed = re.search(r"resumed at step (\d+)|is finished: (\d+)", said[point])
            assert int(resumed[1] or resumed[2]) >= n_saved if resumed else n_saved == 0
            assert outcome(f"out/{point}") == whole
            assert_tidy(f"out/{point}", keep=KEEP)


def test_no_name_is_given_before_what_it_names_is_on_the_disk(operations):
    """Power can go at any moment, and take with it what was not synced, in any order."""
    state, folder_synced = {}, True  # of each file: buffered, written, synced
    for operation, *names in operations:
        name = names[-1]
        if operation in ("open", "write"):
            state[name] = "buffered"
        elif operation in ("flush", "close") and state[name] == "buffered":
            state[name] = "written"
        elif operation == "fsync" and name == "whole":
            folder_synced = True
        elif operation == "fsync" and state[name] == "written":
            state[name] = "synced"
        elif operation in ("link", "replace"):
            assert state[names[0]] == "synced", names
            assert not name.startswith("step_") or state["metrics.jsonl"] == "synced"
            assert folder_synced or operation == "link", names
            state[name] = "synced"
            folder_synced = folder_synced and operation == "link"
        elif operation == "unlink" and name.endswith(".pt"):
            assert folder_synced, name
    assert folder_synced


def test_best_is_named_before_the_step_and_old_steps_go_last(operations):
    """Whoever finds a step finds its best.pt; and there is always a step to go back to."""
    named = {"replace": "+", "unlink": "-"}
    changes = [
        named[operation] + names[-1]
        for operation, *names in operations
        if operation in named and names[-1].endswith(".pt")
    ]
    step = "step_{:08d}.pt".format
    expected = []
    for i in range(1, SAVES + 1):
        expected += ["+" + step(i)] + ["-" + step(i - KEEP)] * (i > KEEP)
    assert [change for change in changes if change != "+best.pt"] == expected
    bests = [i for i, change in enumerate(changes) if change == "+best.pt"]
    assert bests
    assert all(changes[i + 1].startswith("+step_") for i in bests)


# ------------------------------------------------------------------------------------------
# Killed at any moment


def kill_again_and_again(chain: int, kills: int, keys: list[str], length: float) -> None:
    """Kill runs until there were so many kills; prints a row for each: folder, code, steps.

    Each is started again until it gets to its end, in spite of the kills or after the last.
    """
    draw, n_runs, killed, code = random.Random(chain), 0, 0, None
    while killed < kills or code != 0:
        folder = f"out/{chain}_{n_runs}"
        run = fork(run_train, *keys, f"--out_dir={folder}", log=f"runs{chain}.txt")
        if killed < kills:
            time.sleep(draw.uniform(0, length))
            os.kill(run, signal.SIGKILL)
        code = wait(run)
        steps = [path.name for path in checkpoint.step_files(folder)]
        print(json.dumps({"folder": folder, "code": code, "steps": steps}))
        killed, n_runs = killed + (code != 0), n_runs + (code == 0)


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.long)])
def test_a_run_killed_again_and_again_ends_as_if_nothing_had_been(kills, tiny_run):
    """Whatever it was doing then."""
    keys = [*TINY, "--max_iters=40", "--sample_tokens=0", "--dropout=0.1", "--init_from=auto"]
    end(start(run_train, "--help"))  # the first child waits for the server of all
    began = time.perf_counter()
    assert end(start(run_train, *keys, "--out_dir=out/whole")) == [0]
    rest = (kills // 2, keys, time.perf_counter() - began)
    chains = [start(kill_again_and_again, i, *rest, log=f"rows{i}.txt") for i in (0, 1)]
    assert end(*chains, timeout=60 * kills) == [0, 0]
    printed = "".join(Path(f"rows{i}.txt").read_text() for i in (0, 1))
    rows = [json.loads(row) for row in printed.splitlines()]
    assert sum(row["code"] == -signal.SIGKILL for row in rows) == kills
    for row in rows:
        assert row["code"] in (0, -signal.SIGKILL), row
        if row["code"] == 0:
            assert outcome(row["folder"]) == outcome("out/whole")
            assert_tidy(row["folder"], keep=KEEP + 1)  # killed before the oldest one went
    amid = {row["steps"][-1] for row in rows if row["steps"] and row["code"] != 0}
    assert len(amid) >= 3  # when there was something to lose


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.long)])
def test_the_script_itself_can_be_killed_while_it_trains(kills, tiny_run):
    """With its own start, its own picture, its own end."""
    keys = [*TINY, "--eval_interval=50", "--log_interval=1", "--dropout=0.1", "--init_from=auto"]
    keys += [f"--max_iters={100 * kills}"]
    assert end(start(run_train, *keys, "--out_dir=out/whole")) == [0]
    command = [sys.executable, ROOT / "train.py", *keys, "--out_dir=out/x"]
    draw, one_thread = random.Random(0), {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(kills):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=one_thread) as run:
            updates = (line for line in run.stdout if re.match(r"step +\d+ \| loss", line))
            for _ in range(draw.randint(51, 99)):  # one checkpoint further, however fast it is
                next(updates)
            run.kill()
        assert run.returncode == -signal.SIGKILL
    said = subprocess.run(command, capture_output=True, text=True, env=one_thread)
    assert (said.returncode, said.stderr) == (0, "")
    assert "resumed at step" in said.stdout
    assert outcome("out/x") == outcome("out/whole")
    assert_tidy("out/x", keep=2, also=("loss.png",) * Path("out/x/loss.png").exists())


# ------------------------------------------------------------------------------------------
# Damaged


@pytest.fixture(scope="module")
def stopped_place(trained_place, tmp_path_factory) -> Path:
    """A folder with data/tiny, out/whole, a run of eight updates, and out/x, six of them."""
    place = tmp_path_factory.mktemp("stopped")
    shutil.copytree(trained_place, place, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr("nanolm.runs.pictures.draw_losses", lambda *_, **__: False)
        train(*EIGHT_UPDATES, "--out_dir=out/whole")
        train(*EIGHT_UPDATES, "--max_iters=6")
    return place


@pytest.fixture
def stopped_run(stopped_place, workplace) -> Path:
    """out/x below the current folder: a run that stands at 6 of its 8 updates."""
    shutil.copytree(stopped_place, workplace, dirs_exist_ok=True)
    return Path("out", "x")


class Bomb:
    """Its pickle makes a folder when it is read."""

    def __reduce__(self):
        return os.mkdir, ("bombed",)


def cut(n: int | Callable[[int], int]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        whole = path.read_bytes()
        path.write_bytes(whole[: n if isinstance(n, int) else n(len(whole))])

    return damage


def changed(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """A sound file with another content."""

    def damage(path: Path) -> None:
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)

    return damage


def transpose_a_weight(content: dict) -> None:
    name = next(name for name, w in content["model"].items() if w.shape[0] != w.shape[-1])
    content["model"][name] = content["model"][name].T.contiguous()


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = {
    "empty": cut(0),
    "one byte": cut(1),
    "half": cut(lambda n: n // 2),
    "last byte missing": cut(-1),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "picture": lambda path: shutil.copyfile(ROOT / "docs" / "loss.png", path),
    "folder": make_folder,
    "unreadable": lambda path: path.chmod(0),
    "no config": changed(lambda content: content.pop("config")),
    "a weight missing": changed(lambda content: content["model"].popitem()),
    "a weight transposed": changed(transpose_a_weight),
    "newer format": changed(lambda content: content.update(format=checkpoint.FORMAT + 1)),
    "code": changed(lambda content: content.update(step=Bomb())),
    "bare pickle": lambda path: path.write_bytes(pickle.dumps(Bomb())),
}
ROOT_READS_ALL = pytest.mark.skipif(os.geteuid() == 0, reason="root reads what is unreadable")
MARKS = {"unreadable": ROOT_READS_ALL}


@pytest.mark.parametrize(
    "damage", [pytest.param(kind, marks=MARKS.get(kind, ())) for kind in DAMAGES]
)
def test_a_bad_checkpoint_is_named_once_and_costs_only_time(
    damage, stopped_run, monkeypatch, capsys
):
    """The step before it is taken, and it is out of the way, even if that run is killed, too."""
    bad = stopped_run / "step_00000006.pt"
    DAMAGES[damage](bad)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("nanolm.training.update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(*EIGHT_UPDATES, "--init_from=resume")
    monkeypatch.setattr("nanolm.training.update", update)
    out = capsys.readouterr().out
    assert out.count("warning ") == 1
    assert out.count(f"warning   cannot read the checkpoint {bad}: ") == 1
    assert "resumed at step 4" in out
    train(*EIGHT_UPDATES, "--init_from=resume")
    out = capsys.readouterr().out
    assert "warning " not in out
    assert "resumed at step 4" in out
    assert outcome(stopped_run) == outcome("out/whole")
    assert_tidy(stopped_run, keep=4, also=("step_00000006.pt.bad",))
    assert not Path("bombed").exists()


@pytest.mark.parametrize("way", ["resume", "auto"])
def test_a_run_without_a_sound_file_stops_and_changes_nothing(way, stopped_run, run_main):
    """Never start from 0 where something is lost; what is left may still be rescued."""
    for i, path in enumerate(stopped_run.glob("*.pt")):
        cut(100 * i)(path)
    before = {path: path.read_bytes() for path in stopped_run.iterdir()}
    keys = [*TINY, *EIGHT_UPDATES, "--out_dir=out/x", f"--init_from={way}"]
    code, _, err = run_main("train", *keys)
    assert code == 2
    assert re.fullmatch(r"error: out/x has no sound checkpoint: .*step_00000002\.pt.*\n", err)
    assert before == {path: path.read_bytes() for path in stopped_run.iterdir()}


def test_the_best_is_taken_where_no_step_is_sound(stopped_run, capsys):
    """It holds all that a step does."""
    best = checkpoint.load(stopped_run / checkpoint.BEST)["step"]
    for path in checkpoint.step_files(stopped_run):
        path.unlink()
        path.write_bytes(b"damaged")
    train(*EIGHT_UPDATES, "--init_from=resume")
    assert f"resumed at step {best}" in capsys.readouterr().out
    assert outcome("out/x") == outcome("out/whole")


@pytest.mark.parametrize("flips", [100, pytest.param(1000, marks=pytest.mark.long)])
def test_a_flipped_bit_in_a_checkpoint_is_seen_or_harmless(flips, stopped_run):
    """Wherever it is: no run continues from numbers that are not its own."""
    path = checkpoint.step_files(stopped_run)[-1]
    whole, content = path.read_bytes(), checkpoint.load(path, check_fits)
    draw, refused = random.Random(0), 0
    for _ in range(flips):
        damaged, bit = bytearray(whole), draw.randrange(8 * len(whole))
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            found = checkpoint.load(path, check_fits)
        except ValueError as error:
            assert str(error).startswith(f"cannot read the checkpoint {path}: ")  # noqa: PT017
            refused += 1
            continue
        assert frozen(found) == frozen(content)
    assert refused > flips / 2


# ------------------------------------------------------------------------------------------
# Out of room


class Full(Wrapped):
    """A file on a disk that has room for so many bytes more."""

    def __init__(self, file: io.IOBase, room: int):
        super().__init__(file)
        self.room = room

    def write(self, data) -> int:
        n = len(data)
        self.file.write(data[: self.room])
        self.room -= n
        if self.room < 0:
            self.room = 0
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return n


@pytest.fixture
def fill_disk(monkeypatch) -> Callable[..., None]:
    """fill_disk(".pt.tmp", 100): files whose names end so have room for so many bytes."""

    def fill(ending: str, room: int) -> None:
        def open_full(path, mode="r", **options):
            file = open(path, mode, **options)  # noqa: SIM115
            return Full(file, room) if str(path).endswith(ending) and mode != "rb" else file

        monkeypatch.setattr(files, "open", open_full, raising=False)

    return fill


def full_disk_is_said(path: str, err: str) -> bool:
    """Whether the one line names the file, what it needs, and the way back."""
    pattern = (
        rf"error: cannot write {re.escape(path)}: [^;]+; it needs \d{{2}},\d{{3}} bytes; the last "
        r"checkpoint is out/x/step_00000006\.pt: "
        r"continue with python train\.py --out_dir=out/x --init_from=resume\n"
    )
    return bool(re.fullmatch(pattern, err))


RESUME = [*TINY, *EIGHT_UPDATES, "--out_dir=out/x", "--init_from=resume"]


def assert_stands_at_six_and_ends_well(folder: Path) -> None:
    """The old step is the newest and sound, no part of another is left; now there is room."""
    content, problems = checkpoint.load_newest(folder, check_fits)
    assert (content["step"], problems) == (6, [])
    assert_tidy(folder, keep=3)
    train(*EIGHT_UPDATES, "--init_from=resume")
    assert outcome(folder) == outcome("out/whole")
    assert_tidy(folder, keep=4)


@pytest.mark.parametrize("tenth", range(10))
def test_a_disk_that_fills_during_a_save_costs_only_time(
    tenth, stopped_run, run_main, fill_disk, monkeypatch
):
    """At whatever byte; the line says what is lacking, and how to go on once it is there."""
    size = Path("out/whole/step_00000008.pt").stat().st_size
    fill_disk(".pt.tmp", (size - 1) * tenth // 9)
    code, _, err = run_main("train", *RESUME)
    assert code == 2
    assert full_disk_is_said("out/x/step_00000008.pt", err), err
    monkeypatch.delattr(files, "open")
    assert_stands_at_six_and_ends_well(stopped_run)


@pytest.mark.parametrize("name", ["fsync", "replace", "link and copy"])
def test_a_disk_that_fills_at_the_end_of_a_save_costs_only_time(
    name, stopped_run, run_main, monkeypatch
):
    """A file system may take the bytes, and find no place for them when they are synced."""

    def lacks_room(function: Callable, source: str) -> Callable:
        def call(first, *others):
            if not any(os.path.samefile(first, path) for path in stopped_run.glob(source)):
                return function(first, *others)
            if function.__name__ == "copyfile":
                Path(others[0]).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return call

    with monkeypatch.context() as patch:
        if name == "link and copy":
            patch.setattr(os, "link", lacks_room(os.link, "best.pt"))
            patch.setattr(shutil, "copyfile", lacks_room(shutil.copyfile, "best.pt"))
        else:
            patch.setattr(os, name, lacks_room(getattr(os, name), ".*.pt.tmp"))
        code, _, err = run_main("train", *RESUME)
    assert code == 2
    assert full_disk_is_said("out/x/step_00000008.pt", err), err
    assert_stands_at_six_and_ends_well(stopped_run)


def train_with_limit(n_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
    run_train(*RESUME)


def test_a_limit_of_the_system_during_a_save_costs_only_time(stopped_run):
    """The system's own error, from the system's own write."""
    size = Path("out/whole/step_00000008.pt").stat().st_size
    assert end(start(train_with_limit, size // 2)) == [2]
    last = Path("log.txt").read_text().splitlines(keepends=True)[-1]
    assert full_disk_is_said("out/x/step_00000008.pt", last)
    assert os.strerror(errno.EFBIG) in last
    assert_stands_at_six_and_ends_well(stopped_run)


@pytest.mark.parametrize("room", [0, 1, 40])
def test_a_log_that_cannot_grow_stops_the_run_and_costs_only_time(
    room, stopped_run, run_main, fill_disk, monkeypatch
):
    """Half a row may be left: it is none, and the row is written again."""
    fill_disk("metrics.jsonl", room)
    code, _, err = run_main("train", *RESUME)
    assert code == 2
    assert err.count("\n") == 1
    for part in ("out/x/metrics.jsonl", os.strerror(errno.ENOSPC), "--init_from=resume"):
        assert part in err
    monkeypatch.delattr(files, "open")
    assert_stands_at_six_and_ends_well(stopped_run)
