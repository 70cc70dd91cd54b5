"""One value of a setting, from YAML or from the command line, in the type that it must have."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

from calib.errors import OptionError

_FUNCTION = re.compile(r"\w+(\.\w+)*:\w+(\.\w+)*")
_BYTES = re.compile(r"(\d+(?:\.\d+)?) *([kmgt]i?)?b?", re.IGNORECASE)
_LONGEST_QUOTE = 60


@dataclass(frozen=True, slots=True)
class Origin:
    """Where values stand: what messages put before a key, and what paths are relative to."""

    prefix: str
    folder: Path


Reader = Callable[[object, str, Origin], object]
Bits = int | Literal["none"]


def expected(where: str, what: str, found: object) -> str:
    """A message: where, what is allowed, what was found."""
    return f"{where} must be {what}, got {_shown(found)}"


def is_function(data: str) -> bool:
    """Whether it has the form ``package.module:function``; a path might, too."""
    return _FUNCTION.fullmatch(data) is not None and not Path(data).exists()


def width_of(bits: Bits | None, usual: int) -> int | None:
    """A width, ``usual`` where none is set, None where there shall be none."""
    if bits is None:
        return usual
    return None if bits == "none" else bits


def _shown(value: object) -> str:
    """Short whatever it holds."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, Mapping):
        return "a mapping"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}..."


def _flag(value: object, where: str, _: Origin) -> bool:
    if not isinstance(value, bool):
        raise OptionError(expected(where, "true or false", value))
    return value


def _whole(value: object, where: str, _: Origin) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise OptionError(expected(where, "a whole number", value))
    return value


def _bits(value: object, where: str, _: Origin) -> Bits:
    """``4`` or ``none``; YAML reads ``null`` as nothing, which is not it."""
    if value == "none":
        return "none"
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise OptionError(expected(where, "a whole number or none", value))
    return value


def _number(value: object, where: str, _: Origin) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise OptionError(expected(where, "a number", value))
    return float(value)


def _fraction(value: object, where: str, origin: Origin) -> float:
    """A number, or text such as ``1/255``."""
    if not isinstance(value, str):
        return _number(value, where, origin)
    numerator, slash, denominator = value.partition("/")
    try:
        number = float(numerator) / float(denominator) if slash else float(numerator)
    except (ValueError, ArithmeticError):
        number = math.nan
    if not math.isfinite(number):
        raise OptionError(expected(where, "a number or a fraction, as 1/255", value))
    return number


def _numbers(value: object, where: str, origin: Origin) -> tuple[float, ...]:
    """A list, one number, or text with commas."""
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        return (_fraction(items, where, origin),)
    if not items:
        raise OptionError(f"{where} must be a number or several, got none")
    if len(items) == 1:
        return (_fraction(items[0], where, origin),)
    return tuple(_fraction(item, f"{where}[{n}]", origin) for n, item in enumerate(items))


def _text(value: object, where: str, _: Origin) -> str:
    if not isinstance(value, str):
        hint = "" if isinstance(value, list | tuple | Mapping) or value is None else " in quotes"
        raise OptionError(expected(where, f"text{hint}", value))
    return value


def _size(value: object, where: str, _: Origin) -> str:
    """``224`` is a number to YAML, ``240x320`` and ``87.5%`` are text."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise OptionError(expected(where, "a size, as 224, 240x320 or 87.5%", value))
    return str(value)


def _bytes(value: object, where: str, _: Origin) -> int:
    """A number of bytes, or text with a unit: ``3GB``, ``512MB``, ``1.5GiB``."""
    found = None if isinstance(value, bool | float) else _BYTES.fullmatch(str(value).strip())
    if not isinstance(value, int | str) or found is None:
        raise OptionError(expected(where, "a size, as 3GB, 512MB, 1.5GiB or 4000000000", value))
    number, prefix = found.groups()
    unit, exponent = (prefix or "").lower(), "kmgt"
    factor = (1024 if unit.endswith("i") else 1000) ** (1 + exponent.index(unit[0]) if unit else 0)
    return int(Fraction(number) * factor)


def _names(value: object, where: str, origin: Origin) -> tuple[str, ...]:
    """A list, or text with commas."""
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not items:
        raise OptionError(expected(where, "a list of names", value))
    return tuple(_text(item, f"{where}[{n}]", origin).strip() for n, item in enumerate(items))


def _path(value: object, where: str, origin: Origin) -> Path:
    if not value or not isinstance(value, str | Path) or "\0" in str(value):
        raise OptionError(expected(where, "a path", value))
    return origin.folder / value


def _paths(value: object, where: str, origin: Origin) -> tuple[Path, ...]:
    """A list, or one."""
    if not isinstance(value, list | tuple):
        return (_path(value, where, origin),)
    return tuple(_path(item, f"{where}[{n}]", origin) for n, item in enumerate(value))


def _data(value: object, where: str, origin: Origin) -> str:
    """A path, or ``package.module:function``, which is relative to nothing."""
    path = _path(value, where, origin)
    return str(value if is_function(str(value)) and not path.exists() else path)


def _mapping(value: object, where: str, origin: Origin) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise OptionError(expected(where, "a mapping, as '{input: output}'", value))
    return {key: _text(item, f"{where}.{key}", origin) for key, item in value.items()}


# By the name of a setting where it is special, otherwise by the type of its field.
READERS: Mapping[str, Reader] = {
    "data": _data,
    "max-memory": _bytes,
    "resize": _size,
    "crop": _size,
    "pixel-scale": _fraction,
    "bool": _flag,
    "int": _whole,
    "Bits": _bits,
    "float": _number,
    "tuple[float, ...]": _numbers,
    "str": _text,
    "Kind": _text,
    "tuple[str, ...]": _names,
    "Path": _path,
    "tuple[Path, ...]": _paths,
    "Mapping[str, str]": _mapping,
}
