"""Files appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from calib.errors import OutputError, one_line


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path in the directory of ``path``, renamed to it when the block ends well.

    Raises:
        OutputError: if the file system refuses; nothing is left behind then.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise OutputError(f"{path}: cannot be written: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)
