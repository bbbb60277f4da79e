"""Laws of the map over processes: it is map, a few items ahead, and leaves nobody behind."""

import operator
import os
import subprocess
import sys
from functools import partial
from itertools import islice, pairwise
from multiprocessing import active_children

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from nanolm.system import workers
from nanolm.system.workers import bundles, in_order


@pytest.mark.parametrize(("processes", "n"), [(2, 2), (2, 9), (3, 20)])
def test_results_are_those_of_map_in_order(processes, n):
    """Though the first item takes longer than the others."""
    items = [range(5 * 10**6), *map(range, range(20))][:n]
    assert list(in_order(sum, iter(items), processes=processes)) == list(map(sum, items))


@pytest.mark.parametrize(("processes", "n"), [(4, 0), (4, 1), (1, 5)])
def test_no_process_is_started_for_one_alone_or_a_single_item(processes, n, monkeypatch):
    monkeypatch.setattr(workers, "ProcessPoolExecutor", None)
    assert list(in_order(abs, [-7] * n, processes=processes)) == [7] * n


@pytest.mark.parametrize("processes", [1, 2])
def test_items_are_taken_a_few_ahead_until_nobody_wants_more(processes):
    taken = []
    results = in_order(abs, (taken.append(i) or i for i in range(1000)), processes=processes)
    for done, result in enumerate(islice(results, 10), start=1):
        assert result == done - 1
        assert processes - 1 <= len(taken) - done <= 3 * processes
    results.close()
    assert active_children() == []


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_arrives_as_itself_after_the_results_before_it(processes):
    results = in_order(partial(operator.floordiv, 12), [3, 4, 0, 6], processes=processes)
    assert [next(results), next(results)] == [4, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert active_children() == []


def test_an_error_of_the_items_arrives_as_itself():
    with pytest.raises(ZeroDivisionError):
        list(in_order(abs, (12 // i for i in [3, 4, 0, 6]), processes=2))
    assert active_children() == []


def test_a_killed_worker_is_an_error_with_a_way_out():
    with pytest.raises(ValueError, match=r"worker process has died.* --processes=1"):
        list(in_order(os._exit, [1, 2, 3], processes=2))


def test_workers_end_with_the_process_that_started_them():
    """Also when it is killed: what they write to closes with the last of them."""
    script = """
import time
from nanolm.system.workers import in_order

for _ in in_order(time.sleep, [0, 30, 30, 30], processes=2):
    print("at work", flush=True)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert parent.stdout.readline() == b"at work\n"
    parent.kill()
    assert parent.communicate(timeout=10)[0] == b""


@given(st.lists(st.integers(0, 9)), st.integers(1, 12))
def test_bundles_are_the_items_each_within_its_size_or_alone(items, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "BUNDLE", most)
        found = list(bundles(iter(items), size=abs))
        of_texts = list(bundles(["a" * n for n in items]))
    assert [[len(text) for text in bundle] for bundle in of_texts] == found
    assert [item for bundle in found for item in bundle] == items
    assert all(bundle and (sum(bundle) <= most or len(bundle) == 1) for bundle in found)
    for bundle, following in pairwise(found):
        assert sum(bundle) + following[0] > most  # it had no room
