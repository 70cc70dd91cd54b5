"""Mutations that know nothing of ONNX: of any field of a protobuf message, and of bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

Rng = np.random.Generator

INTEGERS = (-1, 0, 1, 2, 3, 7, 16, 127, 255, 65535, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63))
TEXTS = ("", "x", "a\nb", "é", "\0", "x" * 5000)


def field(rng: Rng, message: Any) -> bool | None:
    """Any field of any message within ``message``: dropped, changed, more or fewer of it."""
    there = list(_fields(message))
    if not there:
        return False
    parent, name, value = there[int(rng.integers(len(there)))]
    if rng.random() < 0.15:
        parent.ClearField(name)
    elif hasattr(value, "extend"):
        _change_repeated(rng, value)
    elif not hasattr(value, "ListFields"):
        try:
            setattr(parent, name, _other(rng, value))
        except ValueError:  # out of bounds of its type, or of an enumeration
            parent.ClearField(name)
    return None


def _fields(message: Any) -> Iterator[tuple[Any, str, Any]]:
    """Every field that is set: its message, its name, its value."""
    for descriptor, value in message.ListFields():
        yield message, descriptor.name, value
        if hasattr(value, "ListFields"):
            yield from _fields(value)
        elif hasattr(value, "add"):  # repeated messages
            for element in value:
                yield from _fields(element)


def _change_repeated(rng: Rng, values: Any) -> None:
    first, second = (int(n) for n in rng.integers(len(values), size=2))
    kind = int(rng.integers(4))
    if kind == 0:
        del values[first]
    elif kind == 1:
        values.extend([values[first]])
    elif hasattr(values, "add"):  # messages cannot be assigned
        held = type(values[first])()
        held.CopyFrom(values[first])
        values[first].CopyFrom(values[second])
        values[second].CopyFrom(held)
    elif kind == 2:
        values[first], values[second] = values[second], values[first]
    else:
        values[first] = _other(rng, values[first])


def _other(rng: Rng, value: Any) -> Any:
    if isinstance(value, bytes):
        return flipped(rng, value)
    if isinstance(value, str):
        return TEXTS[int(rng.integers(len(TEXTS)))]
    if isinstance(value, float):
        return (0.0, -1.0, 1e30, float("nan"), float("inf"))[int(rng.integers(5))]
    number = INTEGERS[int(rng.integers(len(INTEGERS)))]
    return number if abs(number) < 2**31 or abs(value) >= 2**31 else number % 2**31


def flipped(rng: Rng, data: bytes) -> bytes:
    """Some bits of ``data`` flipped."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 6)) if changed else 0):
        changed[int(rng.integers(len(changed)))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def damaged(rng: Rng, data: bytes) -> bytes:
    """``data`` with bytes flipped, left out, put in, copied elsewhere, or cut off."""
    if not data:
        return b"\x08"
    first, last = sorted(int(n) for n in rng.integers(len(data) + 1, size=2))
    few = data[first : first + int(rng.integers(1, 17))]
    fresh = rng.bytes(int(rng.integers(1, 17)))
    same = bytes([int(rng.integers(256))]) * len(few)
    changed = (
        flipped(rng, data),
        data[:first] + data[first + len(few) :],
        data[:first] + fresh + data[first:],
        data[:first] + few + data[first:last] + data[last:],
        data[:first] + same + data[first + len(few) :],
        data[: max(first, 1)],
    )
    return changed[max(int(rng.integers(8)) - 2, 0)]
