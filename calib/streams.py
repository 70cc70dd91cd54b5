"""Tasks side by side, in threads: for work that releases the interpreter lock."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event, Semaphore
from types import TracebackType


class Streams:
    """Runs tasks in ``n`` threads; of the tasks that fail, the error of the earliest is raised.

    Whichever is free takes the next. Up to ``ahead`` tasks wait for each thread, which then need
    not wait for them. As a context manager, it waits for what is under way; ``cancel`` is called
    first if a task failed or there was an interrupt, to end that soon. An error of the block's own
    is later than the tasks put before it, and is raised if none of them fails. After an error no
    task is run any more.
    """

    def __init__(self, n: int, cancel: Callable[[], None] = lambda: None, ahead: int = 0):
        self._room = Semaphore(n * (1 + ahead))
        self._cancel = cancel
        gate = Event()  # a thread that works at once would keep the next from starting
        self._threads = ThreadPoolExecutor(n, "octav-calibrate", initializer=gate.wait)
        try:
            for _ in range(n):
                self._threads.submit(int)
        finally:
            gate.set()
        self._under_way: deque[Future[None]] = deque()
        self._n_put = 0
        self._failed: float = math.inf
        self._heard = False

    def put(self, task: Callable[[], None]) -> None:
        """Starts ``task`` as soon as a thread is free; raises what an earlier one raised."""
        self._room.acquire()
        if self._failed < math.inf:
            self.drain()
        while self._under_way and self._under_way[0].done():
            self._hear()
        begun = self._threads.submit(self._run, self._n_put, task)
        begun.add_done_callback(lambda _: self._room.release())
        self._under_way.append(begun)
        self._n_put += 1

    def drain(self) -> None:
        """Waits until all tasks are done; raises what one of them raised."""
        while self._under_way:
            self._hear()

    def _hear(self) -> None:
        try:
            self._under_way.popleft().result()
        except BaseException:
            self._heard = True
            self._room.release()
            raise

    def _run(self, number: int, task: Callable[[], None]) -> None:
        if number > self._failed:
            return
        try:
            task()
        except BaseException:
            self._failed = min(self._failed, number)
            raise

    def __enter__(self) -> Streams:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is not None and issubclass(kind, Exception) and not self._heard:
                self.drain()
        finally:
            if kind is not None:
                self._threads.shutdown(wait=False, cancel_futures=True)
                self._cancel()
            self._threads.shutdown()
