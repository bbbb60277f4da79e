"""Laws of the map over threads: it is map, a few items ahead."""

import time
from itertools import islice

import pytest

from nanolm.system.workers import in_order, n_cores


@pytest.mark.parametrize("n", [0, 1, 2, 50])
def test_results_are_those_of_map_in_order(n):
    """Though the first item takes longer than the others."""

    def work(i: int) -> int:
        time.sleep(0.1 if i == 0 else 0)
        return i * i

    assert list(in_order(work, iter(range(n)))) == [i * i for i in range(n)]


def test_items_are_taken_a_few_ahead_until_nobody_wants_more():
    taken = []
    results = in_order(abs, (taken.append(i) or i for i in range(10_000)))
    for done, result in enumerate(islice(results, 10), start=1):
        assert result == done - 1
        assert n_cores() <= len(taken) - done <= 3 * n_cores()
    results.close()
    assert len(taken) < 10_000


def test_an_error_arrives_as_itself_after_the_results_before_it():
    """An error of the work, and one of the items."""
    results = in_order(lambda i: 12 // i, [3, 4, 0, 6])
    assert [next(results), next(results)] == [4, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)
    with pytest.raises(ZeroDivisionError):
        list(in_order(abs, (12 // i for i in [3, 4, 0, 6])))
