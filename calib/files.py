"""Files appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from calib.errors import OutputError, one_line

if sys.platform != "win32":
    import fcntl

_PREFIX = ".octav-calibrate-"
_LOCK = ".lock"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an `OSError` of the block into an `OutputError` that names ``path``."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise OutputError(f"{path}: cannot be written: {reason}") from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path with the name of ``path`` in a hidden folder beside it. When the block ends well, all
    files of that folder are forced to disk and moved to where ``path`` is, ``path`` itself last.

    Raises:
        OutputError: if the folder cannot be made, or a file not be moved. Nothing is left behind
            when anything fails; what a killed process left is removed by the next one.
    """
    with writing(path):
        _remove_leftovers(path.parent)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=path.parent))
    try:
        with _locked(folder):
            yield folder / path.name
            with writing(path):
                _move_out(folder, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move_out(folder: Path, path: Path) -> None:
    names = [file.name for file in folder.iterdir() if file.name not in (_LOCK, path.name)]
    for name in [*sorted(names), path.name]:
        _force_to_disk(folder / name)
    for name in [*sorted(names), path.name]:
        (folder / name).replace(path.with_name(name))
    with suppress(OSError):  # folders cannot be opened everywhere
        _force_to_disk(path.parent)


def _force_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a lock that ends with this process, however it ends."""
    with (folder / _LOCK).open("wb") as lock:
        if sys.platform != "win32":
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_leftovers(parent: Path) -> None:
    """Removes folders of processes that are no more: those with a lock that nobody holds."""
    if sys.platform == "win32":
        return
    for lock in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        with suppress(OSError), lock.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
