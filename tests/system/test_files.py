"""Laws of files: whole or not at all, sealed last, and one writer at a time."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from nanolm.system import files
from nanolm.system.files import lock, sha256, sync, whole_file, whole_folder, write_text


def content(folder: Path) -> dict[str, bytes]:
    """Every file below the folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """What is forced onto the disk and renamed, in order, by names without their folder."""
    names, done = {}, []
    real_open, real_fsync, real_replace = os.open, os.fsync, os.replace

    def fsync(descriptor):
        real_fsync(descriptor)
        done.append(("fsync", names.get(os.fstat(descriptor).st_ino, os.fstat(descriptor).st_ino)))

    def replace(source, target):
        names[os.stat(source).st_ino] = Path(source).name
        real_replace(source, target)
        done.append(("replace", Path(target).name))

    def opened(path, *args, **kwargs):
        descriptor = real_open(path, *args, **kwargs)
        names[os.fstat(descriptor).st_ino] = Path(path).name
        return descriptor

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    return done


# ------------------------------------------------------------------------------------------
# One file


def test_a_whole_file_appears_when_its_block_ends(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with whole_file(path) as file:
        file.write(b"new, and longer than what a buffer holds" * 1000)
        file.flush()
        assert path.read_bytes() == b"old"
    assert content(tmp_path) == {
        "a.bin": b"new, and longer than what a buffer holds" * 1000,
    }


def write_and_raise(file, error):
    file.write(b"half of the n")
    raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError, SystemExit])
@pytest.mark.parametrize("before", [{}, {"a.bin": b"old"}])
def test_a_block_that_raises_leaves_what_was_there(error, before, tmp_path):
    for name, old in before.items():
        (tmp_path / name).write_bytes(old)
    with pytest.raises(error), whole_file(tmp_path / "a.bin") as file:
        write_and_raise(file, error)
    assert content(tmp_path) == before


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_disk_that_fails_leaves_what_was_there(name, tmp_path, monkeypatch):
    (tmp_path / "a.bin").write_bytes(b"old")

    def fail(*arguments):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(OSError, match="full"), whole_file(tmp_path / "a.bin") as file:
        file.write(b"new")
    assert content(tmp_path) == {"a.bin": b"old"}


def test_bytes_are_on_the_disk_before_they_get_their_name(tmp_path, calls):
    """Renaming first gave empty files after a loss of power: the name outlived the bytes."""
    with whole_file(tmp_path / "a.bin") as file:
        file.write(b"new")
        inode = os.fstat(file.fileno()).st_ino
    assert calls == [("fsync", inode), ("replace", "a.bin"), ("fsync", tmp_path.name)]


def test_all_bytes_are_handed_over_before_fsync(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
    with whole_file(tmp_path / "a.bin") as file:
        file.write(b"12345")
    assert sizes[0] == 5


def test_text_is_written_as_utf8_with_its_line_ends(tmp_path):
    write_text(tmp_path / "a.txt", "é\r\n€\n")
    assert content(tmp_path) == {"a.txt": b"\xc3\xa9\r\n\xe2\x82\xac\n"}


# ------------------------------------------------------------------------------------------
# A folder

OLD = {"a": b"old a", "b": b"old b", "seal": b"old a and old b"}
NEW = {"a": b"new a", "b": b"new b", "seal": b"new a and new b", "z": b"new z"}
KEPT = {"other": b"of the user"}


def fill(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def fill_and_raise(folder: Path, error: type[BaseException]) -> None:
    fill(folder, NEW)
    raise error


def test_a_whole_folder_appears_when_its_block_ends(tmp_path):
    folder = tmp_path / "deep" / "down"
    fill(folder, OLD | KEPT)
    with whole_folder(folder, seal="seal") as scratch:
        assert list(scratch.iterdir()) == []
        fill(scratch, NEW)
        assert {name: (folder / name).read_bytes() for name in OLD} == OLD
    assert content(folder) == NEW | KEPT
    assert sorted(path.name for path in folder.iterdir()) == sorted(NEW | KEPT)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [KEPT, OLD | KEPT])
def test_a_folder_whose_block_raises_is_as_it_was(error, before, tmp_path):
    fill(tmp_path, before)
    with pytest.raises(error), whole_folder(tmp_path, seal="seal") as scratch:
        fill_and_raise(scratch, error)
    assert content(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == len(before)


def test_a_folder_that_was_not_there_does_not_stay(tmp_path):
    with pytest.raises(KeyError), whole_folder(tmp_path / "new", seal="seal") as scratch:
        fill_and_raise(scratch, KeyError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["replace", "fsync", "unlink"])
@pytest.mark.parametrize("k", range(9))
def test_a_seal_never_tells_of_other_files(name, k, tmp_path, monkeypatch):
    """The k-th system call fails: either the seal is gone, or all it tells of is there."""
    fill(tmp_path, OLD | KEPT)
    real, count = getattr(os, name), iter(range(100))

    def fail(*arguments, **options):
        if next(count) == k:
            raise OSError("the disk is full")
        return real(*arguments, **options)

    try:
        with whole_folder(tmp_path, seal="seal") as scratch:
            fill(scratch, NEW)
            monkeypatch.setattr(os, name, fail)
    except OSError:
        pass
    monkeypatch.undo()
    left = content(tmp_path)
    if "seal" in left:
        whole = NEW if left["seal"] == NEW["seal"] else OLD
        assert {key: left[key] for key in whole} == whole
    assert left["other"] == KEPT["other"]
    with whole_folder(tmp_path, seal="seal") as scratch:  # the next one mends it
        fill(scratch, NEW)
    assert content(tmp_path) == NEW | KEPT


def test_the_seal_is_removed_first_and_moved_last(tmp_path, calls):
    fill(tmp_path, OLD)
    with whole_folder(tmp_path, seal="seal") as scratch:
        fill(scratch, NEW)
    moves = [call for call in calls if call[0] == "replace"]
    assert moves[-1] == ("replace", "seal")
    assert {call[1] for call in calls if call[0] == "fsync"} >= set(NEW)  # each file's bytes
    first = calls.index(moves[0])
    assert ("fsync", tmp_path.name) in calls[:first]  # the seal is gone before the first move
    assert calls[-1] == ("fsync", tmp_path.name)
    assert max(calls.index(("fsync", name)) for name in NEW) < first


def test_what_a_killed_writer_left_is_cleared(tmp_path):
    fill(tmp_path / ".partial", {"stale": b"half"})
    with whole_folder(tmp_path, seal="seal") as scratch:
        fill(scratch, NEW)
    assert content(tmp_path) == NEW


# ------------------------------------------------------------------------------------------
# The lock

HOLDER = """
import sys
from nanolm.system.files import lock
with lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate(timeout=10)


@pytest.mark.skipif(files.fcntl is None, reason="needs flock")
class TestLock:
    def test_a_second_process_is_refused_until_the_first_lets_go(self, tmp_path, holder):
        with pytest.raises(ValueError, match="in use by another process: wait for it"):
            lock(tmp_path).__enter__()
        with pytest.raises(ValueError, match="in use"):
            whole_folder(tmp_path, seal="seal").__enter__()
        assert content(tmp_path) == {}
        holder.communicate(timeout=10)
        with lock(tmp_path):
            pass

    def test_a_killed_holder_holds_nothing(self, tmp_path, holder):
        holder.send_signal(signal.SIGKILL)
        holder.wait(timeout=10)
        with lock(tmp_path):
            pass

    def test_it_is_let_go_when_the_block_raises(self, tmp_path):
        with pytest.raises(KeyError), lock(tmp_path):
            raise KeyError
        with lock(tmp_path), pytest.raises(ValueError, match=str(tmp_path)), lock(tmp_path):
            pass

    def test_folders_have_locks_of_their_own(self, tmp_path):
        (tmp_path / "a").mkdir()
        with lock(tmp_path), lock(tmp_path / "a"):
            pass


# ------------------------------------------------------------------------------------------
# Fingerprints


@pytest.mark.parametrize("size", [0, 1, 2**16 + 1])
def test_sha256_is_that_of_hashlib(size, tmp_path):
    data = bytes(i % 251 for i in range(size))
    (tmp_path / "a").write_bytes(data)
    assert sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_sync_leaves_no_descriptor_open(tmp_path):
    (tmp_path / "a").touch()
    lowest = os.open(tmp_path, os.O_RDONLY)
    os.close(lowest)
    for path in (tmp_path, tmp_path / "a"):
        sync(path)
    again = os.open(tmp_path, os.O_RDONLY)
    os.close(again)
    assert again == lowest
