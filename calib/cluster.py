"""Observing on the workers of a Dask cluster. The only door to Dask."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import closing, contextmanager, suppress
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import resource_tracker
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

from calib.arrays import Feeds
from calib.data import Data
from calib.errors import CalibError, ClusterError, DataError, OptionError, one_line
from calib.observations import Observations
from calib.progress import Advance
from calib.shards import Counted, Shard, Task, Total, Uneven, count, cut, cut_uneven

_PATIENCE_S = 20
_START_S = 120  # reading libraries from a cold disk, most of all
_POLL_S = 0.02
_WARNINGS = "PYTHONWARNINGS"
_FIRST = "FIRST_COMPLETED"
_PACKAGE = "octav-calibrate"
# Dask raises asyncio's, another class than the built-in one on Python 3.10.
_TIMEOUTS = (TimeoutError, asyncio.TimeoutError)
_LOST = "scheduler: the connection to it was lost: start again"
_LOGGERS = ("distributed", "distributed.client", "tornado.application")

Client = Any


def check_available() -> None:
    """Raises `OptionError` if there is no Dask: to be told before the work, not after it."""
    if find_spec("distributed") is None:
        raise OptionError(
            "workers: need Dask distributed: pip install 'octav-calibrate[distributed]'"
        )


def _dask() -> Any:
    import distributed  # type: ignore[import-untyped, unused-ignore]  # noqa: PLC0415 - half a second

    return distributed


@contextmanager
def connected(workers: int | None = None, scheduler: str | None = None) -> Iterator[Client]:
    """A Dask client: of ``workers`` processes that are started here, and killed when the block
    ends; or of the scheduler at an address.

    Args:
        workers: how many processes, of one thread each.
        scheduler: ``tcp://host:port``; what runs there is left as it is.

    Raises:
        ClusterError: if processes cannot be started, the scheduler cannot be reached, has no
            workers, or these have another version of this package.
        OptionError: if Dask is not installed, or the scheduler is no address.
    """
    check_available()
    with _quiet():
        if scheduler is None:
            with _local(workers or 1) as client:
                yield client
            return
        with closing(_client(scheduler)) as client:
            _check_workers(client, scheduler)
            yield client


@contextmanager
def _local(workers: int) -> Iterator[Client]:
    with TemporaryDirectory(prefix="octav-calibrate-", ignore_cleanup_errors=True) as folder:
        with _uninterrupted_children():
            cluster = _dask().LocalCluster(
                n_workers=0,
                threads_per_worker=1,
                dashboard_address="127.0.0.1:0",
                scheduler_kwargs={"dashboard": False},
                memory_limit=0,
                silence_logs=logging.CRITICAL,
                local_directory=folder,
            )
        _dask().gc.disable_gc_diagnosis()  # an interrupt would get lost in it
        try:
            with closing(_client(cluster)) as client:
                _start(client, cluster, workers)
                yield client
        finally:
            _kill(cluster.workers.values())
            cluster.close()


@contextmanager
def _uninterrupted_children() -> Iterator[None]:
    """Ctrl-C reaches all processes of a terminal; those that are started by threads that the
    block starts leave it to this one."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    _start_tracker()  # which ends with unblocking the signal
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _start_tracker() -> None:
    """Python's process that tidies up behind those that are killed: that it had to is no news."""
    before = os.environ.get(_WARNINGS)
    os.environ[_WARNINGS] = ",".join(filter(None, [before, "ignore:resource_tracker"]))
    try:
        resource_tracker.ensure_running()
    finally:
        del os.environ[_WARNINGS]
        if before is not None:
            os.environ[_WARNINGS] = before


def _start(client: Client, cluster: Any, workers: int) -> None:
    """Not when the cluster is made: an interrupt would leave it behind half started."""
    cluster.scale(workers)
    deadline = time.monotonic() + _START_S
    while len(client.nthreads()) < workers:
        failed = any(nanny.status.name == "failed" for nanny in cluster.workers.values())
        if failed or time.monotonic() > deadline:
            raise ClusterError(
                f"workers: {workers} processes cannot be started; a script must start them under: "
                f"if __name__ == '__main__'"
            )
        time.sleep(_POLL_S)


def _kill(nannies: Iterable[Any]) -> None:
    """At once: Dask would wait for what they are at, which nobody wants any more."""
    for nanny in nannies:
        nanny.auto_restart = False
        if nanny.pid:
            with suppress(ProcessLookupError):
                os.kill(nanny.pid, getattr(signal, "SIGKILL", signal.SIGTERM))


def _client(address: Any) -> Client:
    try:
        return _dask().Client(address, timeout=_PATIENCE_S, set_as_default=False)
    except OSError as error:
        raise ClusterError(f"scheduler: {address} cannot be reached: {one_line(error)}") from error
    except (ValueError, TypeError) as error:
        raise OptionError(
            f"scheduler must be an address, as tcp://host:8786, got {address!r}: {one_line(error)}"
        ) from error


def _check_workers(client: Client, scheduler: str) -> None:
    try:
        client.wait_for_workers(1, timeout=_PATIENCE_S)
    except _TIMEOUTS as error:
        raise ClusterError(
            f"scheduler: {scheduler} has had no worker for {_PATIENCE_S} s: start one with "
            f"dask worker {scheduler}"
        ) from error
    ours = version(_PACKAGE)
    for worker, theirs in client.run(version, _PACKAGE, on_error="return").items():
        if theirs != ours:
            has = f"has {_PACKAGE} {theirs}" if isinstance(theirs, str) else f"has no {_PACKAGE}"
            raise ClusterError(f"scheduler: worker {worker} {has}, here it is {ours}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Dask tells of workers that die and come back; what matters is an error here."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def observe_on(
    client: Client, task: Task, data: Data, stop: int | None = None, advance: Advance | None = None
) -> Observations:
    """What `calib.observing.observe` returns for the samples before ``stop``, integer for integer.

    Shards go to the workers as these become free; that of a worker that dies goes to another one.

    Args:
        client: as `connected` gives it.
        task: what is observed.
        data: what the task was made of.
        stop: None for all samples.
        advance: called with the number of samples of each shard that is done.

    Raises:
        CalibError: what a worker raised, of the earliest samples; `ClusterError` if a shard has
            killed several workers, or all workers are gone.
    """
    assert isinstance(data, Feeds)
    end = data.n_samples if stop is None else min(stop, data.n_samples)
    slots = sum(client.nthreads().values()) or 1
    advance = advance or (lambda _n: None)
    for dealt in (cut, cut_uneven):
        total = Total(task)
        shards = dealt(data, end, slots, task.how.keep_batches)
        with client.as_current():
            if _added(client, shards, total, advance):
                break
        advance(-total.n_samples)
    if total.n_samples == 0:
        raise DataError("the calibration data holds no samples")
    return total.observations()


def _added(client: Client, shards: Sequence[Shard], total: Total, advance: Advance) -> bool:
    """Whether all ``shards`` are in ``total`` now; not if they turn out to be uneven.

    An error is that of the earliest samples, as in one process: what is before it is waited for.
    """
    run = uuid4().hex
    keys = [(f"{_PACKAGE}-{run}", number) for number in range(len(shards))]  # for fair queuing
    futures = client.map(partial(count, total.task), shards, key=keys, pure=False)
    waiting = dict(zip(futures, shards, strict=True))
    failed: CalibError | None = None
    try:
        while waiting:
            for future in _finished(client, list(waiting)):
                if (shard := waiting.pop(future, None)) is None:
                    continue
                found = _result(future, shard)
                if isinstance(found, Uneven):
                    return False
                if isinstance(found, CalibError):
                    failed = found
                    later = [f for f, other in waiting.items() if other.start > shard.start]
                    client.cancel(later)
                    waiting = {f: waiting[f] for f in waiting if f not in later}
                else:
                    total.add(found)
                    advance(found.n_samples)
    finally:
        if waiting:
            client.cancel(list(waiting))
    if failed is not None:
        raise failed
    return True


def _finished(client: Client, futures: Sequence[Any]) -> Sequence[Any]:
    """Those that are done, once one is."""
    while True:
        try:
            done: Sequence[Any] = (
                _dask().wait(futures, timeout=_PATIENCE_S, return_when=_FIRST).done
            )
        except _TIMEOUTS:
            if not client.nthreads():
                raise ClusterError(f"all workers have been gone for {_PATIENCE_S} s") from None
        except CancelledError as error:
            raise ClusterError(_LOST) from error
        else:
            return done


def _result(future: Any, shard: Shard) -> Counted | Uneven | CalibError:
    try:
        found: Counted | Uneven | CalibError = future.result()
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, CancelledError) or type(error).__name__ == "CommClosedError":
            raise ClusterError(_LOST) from error
        died = type(error).__name__ == "KilledWorker"
        reason = (
            "several workers died of them, for lack of memory most likely: try --max-memory or a "
            "smaller --batch-size"
            if died
            else f"a worker failed: {type(error).__name__}: {one_line(error)}"
        )
        where = f"samples {shard.start} to {shard.stop - 1}"
        raise ClusterError(f"{where}: {reason}") from error
    return found
