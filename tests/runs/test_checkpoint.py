"""Laws of checkpoints."""

import os
import pickle
import random
from pathlib import Path

import pytest
import torch

from nanolm.runs import checkpoint
from nanolm.runs.checkpoint import BEST, FORMAT, load, load_best, load_newest, save, step_files


def content(step: int) -> dict:
    return {"step": step, "model": {"w": torch.arange(100.0) + step}, "config": {"name": "x"}}


def same(a: dict, b: dict) -> bool:
    return a["step"] == b["step"] and torch.equal(a["model"]["w"], b["model"]["w"])


def test_what_is_saved_is_loaded(tmp_path):
    path = save(tmp_path, content(7), best=False, keep=1)
    assert path.name == "step_00000007.pt"
    assert same(load(path), content(7))
    assert load(path)["config"] == {"name": "x"}


def test_the_newest_are_kept_and_best_apart(tmp_path):
    for step in (5, 10, 15, 20):
        save(tmp_path, content(step), best=step == 10, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        BEST, "step_00000015.pt", "step_00000020.pt",
    ]  # fmt: skip
    assert same(load_best(tmp_path)[0], content(10))
    assert same(load_newest(tmp_path)[0], content(20))


def test_best_is_found_where_links_are_not_possible(tmp_path, monkeypatch):
    """The copy is on the disk before it gets its name, so that a power cut leaves no half."""
    events, replace, sync = [], os.replace, checkpoint.sync

    def no_link(*_):
        raise OSError("not supported")

    def noted_replace(source, target):
        events.append(("named", Path(target).name))
        replace(source, target)

    def noted_sync(path):
        events.append(("synced", Path(path).name))
        sync(path)

    monkeypatch.setattr(os, "link", no_link)
    monkeypatch.setattr(os, "replace", noted_replace)
    monkeypatch.setattr(checkpoint, "sync", noted_sync)
    save(tmp_path, content(3), best=True, keep=1)
    copied = events.index(("named", "step_00000003.pt"))
    assert events[copied - 1][0] == "synced"
    assert "step_00000003.pt" in events[copied - 1][1]
    save(tmp_path, content(4), best=False, keep=1)
    assert same(load_best(tmp_path)[0], content(3))


def test_without_a_best_the_newest_is_the_best(tmp_path):
    save(tmp_path, content(3), best=False, keep=1)
    assert same(load_best(tmp_path)[0], content(3))


def test_steps_are_ordered_by_number_past_eight_digits(tmp_path):
    for step in (99_999_999, 100_000_000):
        save(tmp_path, content(step), best=False, keep=2)
    assert [load(path)["step"] for path in step_files(tmp_path)] == [99_999_999, 100_000_000]


def test_a_kill_while_saving_leaves_the_old_files(tmp_path, monkeypatch):
    save(tmp_path, content(1), best=True, keep=1)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, content(2), best=True, keep=1)
    assert same(load_newest(tmp_path)[0], content(1))
    assert same(load_best(tmp_path)[0], content(1))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_flipped_bit_is_seen(tmp_path):
    """torch.load alone accepts it."""
    path = save(tmp_path, content(1), best=False, keep=1)
    whole = path.read_bytes()
    draw = random.Random(0)
    for _ in range(100):
        damaged = bytearray(whole)
        place = draw.randrange(len(whole))
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = load(path)
        except ValueError:
            continue  # refused
        assert same(loaded, content(1))  # a bit that nobody reads


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bombed",)


@pytest.mark.parametrize(
    "kind", ["empty", "short", "text", "older", "newer", "pickle", "code", "folder"]
)
def test_a_bad_file_is_named_and_the_one_before_it_is_taken(kind, workplace):
    save(workplace, content(1), best=False, keep=5)
    path = save(workplace, content(2), best=False, keep=5)
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "short":
        path.write_bytes(path.read_bytes()[:-1])
    elif kind == "text":
        path.write_text("this is no checkpoint")
    elif kind == "older":
        torch.save({**content(2), "format": FORMAT - 1}, path)
    elif kind == "newer":
        torch.save({**content(2), "format": FORMAT + 1}, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    elif kind == "code":
        torch.save({"format": FORMAT, "step": Bomb()}, path)
    else:
        path.unlink()
        path.mkdir()
    found, problems = load_newest(workplace)
    assert same(found, content(1))
    assert len(problems) == 1
    assert str(path) in problems[0]
    assert "\n" not in problems[0]
    assert not (workplace / "bombed").exists()


def test_bad_files_only_stop_the_run(tmp_path):
    """Never start from 0 where something is lost."""
    save(tmp_path, content(1), best=False, keep=1).write_bytes(b"")
    with pytest.raises(ValueError, match=r"no sound checkpoint: cannot read .*step_00000001\.pt"):
        load_newest(tmp_path)


def test_no_files_are_another_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        load_newest(tmp_path)
