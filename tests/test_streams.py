"""Tasks side by side: at most so many, in order where it matters, and errors come out."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from warm_script import wait_until

from calib.streams import Streams


def living() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("octav-calibrate")]


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_all_threads_work_at_a_time_and_no_more_tasks_wait_than_asked(n: int, ahead: int) -> None:
    most = most_put = under_way = done = 0
    lock = threading.Lock()
    delays = np.random.default_rng(n).uniform(0, 0.004, 60)

    def task(number: int) -> None:
        nonlocal most, under_way, done
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(delays[number])
        with lock:
            under_way -= 1
            done += 1

    with Streams(n, ahead=ahead) as streams:
        for number in range(60):
            streams.put(lambda number=number: task(number))  # type: ignore[misc]
            with lock:
                most_put = max(most_put, number + 1 - done)
        streams.drain()
        assert done == 60
    assert most == n
    assert n <= most_put <= n * (1 + ahead)
    assert not living()


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_slow_task_holds_up_no_other(ahead: int) -> None:
    others_done = threading.Event()

    def slow() -> None:
        assert others_done.wait(30), "others waited for it"

    with Streams(2, ahead=ahead) as streams:
        streams.put(slow)
        for _ in range(20):
            streams.put(lambda: None)
        streams.put(others_done.set)
        streams.drain()


def test_after_an_error_nothing_is_put_any_more() -> None:
    failed, go_on = threading.Event(), threading.Event()
    put = list[int]()

    def first() -> None:
        assert go_on.wait(30), "nobody waits for it"

    def fail() -> None:
        failed.set()
        raise ValueError("the second")

    def run() -> None:
        with Streams(2, ahead=1) as streams:
            streams.put(first)
            streams.put(fail)
            assert failed.wait(30)
            wait_until(lambda: streams._failed < math.inf)
            threading.Timer(0.3, go_on.set).start()
            for number in range(50):
                streams.put(lambda: None)
                put.append(number)

    with pytest.raises(ValueError, match="the second"):
        run()
    assert not put


def test_what_waits_when_a_task_fails_is_never_started() -> None:
    failing, ended, started = threading.Event(), threading.Event(), list[int]()

    def fail() -> None:
        assert failing.wait(30)
        raise ValueError("the first")

    def slow() -> None:
        assert ended.wait(30)

    def run() -> None:
        with Streams(2, ended.set, ahead=1) as streams:
            streams.put(fail)
            streams.put(slow)
            for number in (2, 3):
                streams.put(lambda number=number: started.append(number))  # type: ignore[misc]
            failing.set()
            time.sleep(0.05)  # the thread that failed is free meanwhile
            streams.drain()

    with pytest.raises(ValueError, match="the first"):
        run()
    assert not started


def test_an_error_that_is_heard_leaves_room_for_what_is_put_in_spite_of_it() -> None:
    def fail() -> None:
        raise ValueError("the first")

    with Streams(1) as streams:
        streams.put(fail)
        with pytest.raises(ValueError, match="the first"):
            streams.put(lambda: None)
        streams.put(lambda: None)


@pytest.mark.parametrize("which", [1, 2])
def test_threads_that_cannot_all_be_started_leave_none_behind(
    which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, begun = threading.Thread.start, list[threading.Thread]()

    def limited(thread: threading.Thread) -> None:
        begun.append(thread)
        if len(begun) == which:
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", limited)
        with pytest.raises(RuntimeError, match="new thread"):
            Streams(2)
    for thread in begun[: which - 1]:
        thread.join(30)
    assert not living()


def test_threads_are_there_before_the_first_task() -> None:
    with Streams(3):
        assert len(living()) == 3
    assert not living()


@pytest.mark.parametrize("ahead", [0, 1])
def test_of_the_tasks_that_fail_the_earliest_is_heard(ahead: int) -> None:
    def fail(number: int, seconds: float) -> None:
        time.sleep(seconds)
        raise ValueError(f"task {number}")

    def run() -> None:
        with Streams(2, ahead=ahead) as streams:
            streams.put(lambda: fail(0, 0.05))
            streams.put(lambda: fail(1, 0.0))
            streams.put(lambda: fail(2, 0.0))
            streams.put(lambda: fail(3, 0.0))
            streams.drain()

    with pytest.raises(ValueError, match="task 0"):
        run()


@pytest.mark.parametrize("ahead", [0, 1])
def test_after_an_error_no_task_is_started_and_what_is_under_way_is_cancelled(ahead: int) -> None:
    started, stop = [], threading.Event()

    def task(number: int) -> None:
        started.append(number)
        if number == 1:
            raise ValueError("task 1")
        assert stop.wait(30), "nobody cancelled"

    def run() -> None:
        with Streams(2, stop.set, ahead) as streams:
            for number in (1, 2, 3):
                streams.put(lambda number=number: task(number))  # type: ignore[misc]
            streams.drain()

    with pytest.raises(ValueError, match="task 1"):
        run()
    assert 3 not in started
    assert not living()


def test_an_error_in_the_block_is_later_than_the_tasks_before_it() -> None:
    def fail() -> None:
        time.sleep(0.05)
        raise ValueError("task 1")

    def run(*tasks: Callable[[], None]) -> None:
        with Streams(2, ahead=1) as streams:
            for task in tasks:
                streams.put(task)
            raise RuntimeError("the block")

    with pytest.raises(ValueError, match="task 1"):
        run(lambda: None, fail)
    with pytest.raises(RuntimeError, match="the block"):
        run(lambda: None, lambda: None)
    assert not living()


def test_an_interrupt_in_the_block_ends_the_threads_and_starts_nothing_more() -> None:
    stop, started = threading.Event(), list[int]()

    def task(number: int) -> None:
        started.append(number)
        assert stop.wait(30), "nobody cancelled"

    def run() -> None:
        with Streams(2, stop.set, ahead=1) as streams:
            for number in range(4):
                streams.put(lambda number=number: task(number))  # type: ignore[misc]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert {*started} <= {0, 1}
    assert not living()


def test_without_an_error_nothing_is_cancelled_and_all_tasks_are_done() -> None:
    done: list[int] = []
    with Streams(2, lambda: pytest.fail("cancelled")) as streams:
        for number in range(5):
            streams.put(lambda number=number: done.append(number))  # type: ignore[misc]
    assert sorted(done) == [0, 1, 2, 3, 4]
