"""Work that is spread over cores: in order, on threads of its own, and none is left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from calib.stacking import spread

MUCH = 1 << 22  # values: more than is left to a single thread


CORES = 3

pytestmark = pytest.mark.usefixtures("_cores")


@pytest.fixture
def _cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: CORES)


def test_results_are_in_the_order_of_the_items() -> None:
    assert list(spread(str, ((n, MUCH) for n in range(20)))) == [str(n) for n in range(20)]


def test_much_work_is_under_way_on_every_core_at_once() -> None:
    together = threading.Barrier(CORES)

    def work(number: int) -> int:
        together.wait(30)
        return number

    assert list(spread(work, ((n, MUCH) for n in range(2 * CORES)))) == [*range(2 * CORES)]


def test_others_are_begun_while_a_long_one_takes_its_time() -> None:
    n, last_begun = 9 * CORES, threading.Event()

    def work(number: int) -> int:
        if number == n - 1:
            last_begun.set()
        elif number == 0:
            assert last_begun.wait(30)
        return number

    assert list(spread(work, ((number, MUCH) for number in range(n)))) == [*range(n)]


def test_items_are_made_only_when_they_are_to_be_begun_soon() -> None:
    unfinished, most, lock = 0, 0, threading.Lock()

    def items() -> Iterator[tuple[int, int]]:
        nonlocal unfinished, most
        for number in range(30 * CORES):
            with lock:
                unfinished += 1
                most = max(most, unfinished)
            yield number, MUCH

    def work(_: int) -> None:
        nonlocal unfinished
        with lock:
            unfinished -= 1

    assert len(list(spread(work, items()))) == 30 * CORES
    assert most <= 2 * CORES + 1  # with the next one


def test_fewer_items_than_cores_are_all_done() -> None:
    assert list(spread(str, [(1, MUCH), (2, 1)])) == ["1", "2"]
    assert list(spread(str, [])) == []


def test_little_work_is_done_in_this_thread() -> None:
    names = spread(lambda _: threading.current_thread().name, [(1, 10), (2, 10)])
    assert set(names) == {threading.current_thread().name}


def test_an_error_of_the_work_or_of_the_items_ends_the_threads() -> None:
    def items(fail_at: int) -> Iterator[tuple[int, int]]:
        for number in range(9):
            if number == fail_at:
                raise ValueError(f"item {number}")
            yield number, MUCH

    before = threading.active_count()
    for fail_at in (1, 2, 5):
        with pytest.raises(ValueError, match=f"item {fail_at}"):
            list(spread(str, items(fail_at)))
    with pytest.raises(ZeroDivisionError):
        list(spread(lambda number: 1 // number, items(9)))
    assert threading.active_count() == before


def test_after_an_error_behind_a_long_one_little_is_begun() -> None:
    begun, failed = list[int](), threading.Event()

    def work(number: int) -> None:
        begun.append(number)
        if number == 0:
            assert failed.wait(30)
            time.sleep(0.2)
        if number == 1:
            failed.set()
            raise ValueError("the second")

    with pytest.raises(ValueError, match="the second"):
        list(spread(work, ((number, MUCH) for number in range(10_000))))
    assert len(begun) < 1_000


def test_results_that_nobody_asks_for_leave_no_thread() -> None:
    before = threading.active_count()
    results = spread(str, ((n, MUCH) for n in range(9)))
    assert next(results) == "0"
    assert isinstance(results, Iterator)
    results.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
