"""Frozen dataclasses in thousands: those of every tensor of every table of a survey."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, make_dataclass
from typing import Any, ParamSpec, TypeVar, cast

P = ParamSpec("P")
Made = TypeVar("Made")


def maker(kind: Callable[P, Made]) -> Callable[P, Made]:
    """What makes instances of ``kind``, a frozen dataclass with slots, in a third of the time.

    Being frozen, it sets each field by a call. Here an instance of a class with the same fields
    that is not frozen becomes one of ``kind``, which Python allows where both have the same slots.

    All fields are to be given, by position: defaults are not known.

    Raises:
        TypeError: if ``kind`` is no dataclass, has no slots, or checks its fields.
    """
    if not is_dataclass(kind) or not hasattr(kind, "__slots__") or hasattr(kind, "__post_init__"):
        raise TypeError(f"{kind!r} must be a dataclass with slots, and without __post_init__")
    loose: Any = make_dataclass(kind.__name__, [each.name for each in fields(kind)], slots=True)

    def make(*args: Any) -> Any:
        made = loose(*args)
        made.__class__ = kind
        return made

    return cast(Callable[P, Made], make)
