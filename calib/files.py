"""Files appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from calib.errors import OutputError, one_line


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
    """A temporary path in the directory of ``path``, renamed to it when the block ends well.

    Raises:
        OutputError: if it cannot be renamed. Nothing is left behind when anything fails.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        with writing(path):
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
