"""Files appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from calib.errors import OutputError, one_line

if sys.platform != "win32":
    import fcntl

_PREFIX = ".octav-calibrate-"
_NEW_PREFIX = ".new-octav-calibrate-"
_LOCK = ".lock"
_JOURNAL = ".journal"
_MAKING_S = 1  # a folder gets its lock within microseconds


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an `OSError` of the block into an `OutputError` that names ``path``."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or f"{one_line(error)} (is the disk full?)"
        raise OutputError(f"{path}: cannot be written: {reason}") from error


@contextmanager
def whole_file(path: Path, outdated: Iterable[Path] = ()) -> Iterator[Path]:
    """A path with the name of ``path`` in a hidden folder beside it. When the block ends well, all
    files of that folder are forced to disk and moved to where ``path`` is, ``path`` itself last;
    then the ``outdated`` ones are removed.

    Raises:
        OutputError: if the folder cannot be made, or a file not be moved. Nothing is left behind
            when anything fails; what a killed process left is removed by the next one.
    """
    with writing(path):
        _remove_leftovers(path.parent)
    with _hidden_folder(path) as folder:
        yield folder / path.name
        with writing(path):
            _move_out(folder, path, list(outdated))


def write_texts(texts: Mapping[Path, str], files: ExitStack) -> None:
    """Writes text files that appear, each whole, when ``files`` is closed.

    Raises:
        OutputError: if one cannot be written.
    """
    for path, text in texts.items():
        with writing(path):
            files.enter_context(whole_file(path)).write_text(text, "utf-8")


@contextmanager
def _hidden_folder(path: Path) -> Iterator[Path]:
    """A new folder with a lock that ends with this process, however it ends."""
    folder = lock = None
    try:
        with uninterrupted(), writing(path):
            folder = Path(tempfile.mkdtemp(prefix=_NEW_PREFIX, dir=path.parent))
            if sys.platform != "win32":
                lock = (folder / _LOCK).open("wb")
                fcntl.flock(lock, fcntl.LOCK_EX)
                # Only now may others find it: what has this prefix and a free lock is left over.
                name = _PREFIX + folder.name.removeprefix(_NEW_PREFIX)
                folder = folder.rename(folder.with_name(name))
        yield folder
    finally:
        try:
            _remove(folder, lock)
        except BaseException:  # Ctrl-C at this very moment
            _remove(folder, lock)
            raise


def _remove(folder: Path | None, lock: IO[bytes] | None) -> None:
    if lock is not None:
        lock.close()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Puts off Ctrl-C and SIGTERM until the block has ended."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is ever interrupted
        return
    received: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in handlers:
        signal.signal(number, lambda caught, _frame: received.append(caught))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
    if received:
        signal.raise_signal(received[0])


def _move_out(folder: Path, path: Path, outdated: list[Path]) -> None:
    others = sorted(f.name for f in folder.iterdir() if f.name not in (_LOCK, path.name))
    journal = {"last": path.name, "new": others, "outdated": [file.name for file in outdated]}
    (folder / _JOURNAL).write_text(json.dumps(journal), "utf-8")
    for name in [_JOURNAL, *others, path.name]:
        _force_to_disk(folder / name)
    for name in [*others, path.name]:
        (folder / name).replace(path.with_name(name))
    with suppress(OSError):  # folders cannot be opened everywhere
        _force_to_disk(path.parent)
    for file in outdated:
        file.unlink(missing_ok=True)


def _force_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(parent: Path) -> None:
    """Removes folders of processes that are no more, those with a lock that nobody holds, and what
    such a process had moved out of it too early, or not removed in time."""
    if sys.platform == "win32":
        return
    for lock in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        with suppress(OSError), lock.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(OSError, ValueError, KeyError):
                _undo(lock.parent)
            shutil.rmtree(lock.parent, ignore_errors=True)
    for folder in parent.glob(f"{_PREFIX}*"):  # it loses its lock only when it is being removed
        if not (folder / _LOCK).exists():
            shutil.rmtree(folder, ignore_errors=True)
    for folder in parent.glob(f"{_NEW_PREFIX}*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > _MAKING_S:
                shutil.rmtree(folder, ignore_errors=True)


def _undo(folder: Path) -> None:
    journal = json.loads((folder / _JOURNAL).read_text("utf-8"))
    stopped_before = (folder / journal["last"]).exists()
    moved = [name for name in journal["new"] if not (folder / name).exists()]
    for name in moved if stopped_before else journal["outdated"]:
        folder.with_name(name).unlink(missing_ok=True)
