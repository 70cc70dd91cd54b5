"""A mapping of settings, from YAML or the command line, as the fields of a dataclass."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from calib.errors import CalibError, OptionError
from calib.readers import READERS, Origin, expected
from calib.rules import TensorRule


def key_of(name: str) -> str:
    """``weight_bits`` → ``weight-bits``."""
    return name.replace("_", "-")


def plain(value: object) -> object:
    """As YAML can hold it."""
    if isinstance(value, TensorRule):
        return {k: v for k, v in asdict(value).items() if v is not None and v is not False}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def read_fields(settings: type, values: Mapping[str, object], origin: Origin) -> dict[str, Any]:
    """``values`` in the types of the fields of ``settings``, by their names.

    Raises:
        CalibError: one of its kinds, for an unknown key or a value of another type; the message
            names the place.
    """
    known = {key_of(f.name): f for f in fields(settings)}
    read: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            place = origin.prefix.removesuffix(".").removesuffix(": ")
            raise OptionError(f"{place}: {_unknown(key, known)}")
        name, kind = known[key].name, str(known[key].type).removesuffix(" | None")
        where = f"{origin.prefix}{key}"
        if kind == "tuple[TensorRule, ...]":
            read[name] = _rules(value, where, origin)
        else:
            read[name] = READERS.get(key, READERS[kind])(value, where, origin)
    return read


def _unknown(key: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ";"
    if len(known) < 10:
        return f"unknown key {key!r}{hint} allowed: {', '.join(known)}"
    if near:
        return f"unknown key {key!r}{hint}"
    return f"unknown key {key!r}; allowed are the long options of --help, without dashes"


def _rules(value: object, where: str, origin: Origin) -> tuple[TensorRule, ...]:
    if not isinstance(value, list | tuple):
        raise OptionError(expected(where, "a list of rules, as '- {match: head, bits: 8}'", value))
    return tuple(_rule(item, f"{where}[{n}]", origin) for n, item in enumerate(value))


def _rule(value: object, where: str, origin: Origin) -> TensorRule:
    if not isinstance(value, dict):
        raise OptionError(expected(where, "a mapping, as '{match: head, bits: 8}'", value))
    read = read_fields(TensorRule, value, Origin(f"{where}.", origin.folder))
    if "match" not in read:
        raise OptionError(f"{where} needs 'match', a regular expression")
    try:
        return TensorRule(**read)
    except CalibError as error:
        key = "" if first_word(error) in read else "method: "
        raise type(error)(f"{where}.{key}{error}") from None


def first_word(error: CalibError) -> str:
    """The setting that a message begins with."""
    return re.split("[^a-z-]", str(error), maxsplit=1)[0]
