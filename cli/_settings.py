"""Settings of a command: those of the YAML file, under those of the command line."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from calib.errors import OptionError

if TYPE_CHECKING:
    from calib.config import Config


def read_settings(config: Path | None, given: Mapping[str, object]) -> Config:
    """What the YAML file says, and over it what the command line gives."""
    with warnings.catch_warnings():  # of what is imported; whether --verbose is not known yet
        warnings.simplefilter("ignore")
        from calib.config import Config

        return (Config() if config is None else Config.read(config)).over(given)


@contextmanager
def named_settings(config: Path | None, given: Mapping[str, object]) -> Iterator[None]:
    """An error that begins with a setting of the file, and not of the command line, names the
    file."""
    try:
        yield
    except OptionError as error:
        setting = re.match(r"-*([a-z-]+)", str(error))
        name = setting.group(1).replace("-", "_") if setting else ""
        if config is None or name in given or not _is_set(config, name):
            raise
        raise OptionError(f"{config}: {str(error).lstrip('-')}") from error


def _is_set(config: Path, name: str) -> bool:
    from calib.config import Config

    return getattr(Config.read(config), name, None) != getattr(Config(), name, None)
