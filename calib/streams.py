"""Tasks side by side, in threads: for work that releases the interpreter lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class Streams:
    """Runs tasks in ``n`` threads; of the tasks that fail, the error of the earliest is raised.

    At most ``n`` tasks are under way at a time, and task k only starts once task k - n is done:
    what every n-th task works with belongs to it alone. As a context manager, it waits for what is
    under way; ``cancel`` is called first if the block fails, to end that soon.
    """

    def __init__(self, n: int, cancel: Callable[[], None] = lambda: None):
        self._n = n
        self._cancel = cancel
        self._threads = ThreadPoolExecutor(n, thread_name_prefix="octav-calibrate")
        self._under_way: deque[Future[None]] = deque()

    def put(self, task: Callable[[], None]) -> None:
        """Starts ``task`` as soon as there is a thread; raises what an earlier one raised."""
        while len(self._under_way) >= self._n:
            self._under_way.popleft().result()
        self._under_way.append(self._threads.submit(task))

    def drain(self) -> None:
        """Waits until all tasks are done; raises what one of them raised."""
        while self._under_way:
            self._under_way.popleft().result()

    def __enter__(self) -> Streams:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._cancel()
        self._threads.shutdown(wait=True, cancel_futures=kind is not None)
