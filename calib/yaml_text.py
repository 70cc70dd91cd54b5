"""YAML text to plain values and back: the part of YAML 1.2 that settings need, and no surprises.

``yes`` and ``off`` are text, ``1e-3`` is a number, ``010`` is none; keys are unique; there are no
tags, no anchors and no objects.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from calib.errors import OptionError, one_line

_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    "bool": re.compile("true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?(0|[1-9][0-9]{0,30})"),
    "float": re.compile(
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    ),
    "null": re.compile("~|null|Null|NULL|"),
}
_RESOLVERS: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {
    None: [(_TAG + kind, re.compile(rf"(?:{p.pattern})\Z")) for kind, p in _SCALARS.items()]
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _RESOLVERS

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            problem = "aliases are not read, write the value out"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _RESOLVERS

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True

    def serialize(self, node: yaml.Node) -> None:
        if isinstance(node, yaml.MappingNode):
            node.flow_style = False  # one key a line; what is in them stays on it
        super().serialize(node)


def load(text: str, source: str) -> object:
    """The one document in ``text`` as mappings, lists, text, numbers, booleans and None.

    Raises:
        OptionError: if it is no YAML, with ``source``, line and column, or a key is given twice.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _value(node, "", source)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = ": ".join(part for part in (error.context, error.problem) if part)
        raise OptionError(f"{source}: {where}{one_line(what)}") from None
    except yaml.reader.ReaderError as error:
        raise OptionError(
            f"{source}: character {error.character:#x} at position {error.position} is not text"
        ) from None
    except RecursionError:
        raise OptionError(f"{source}: is nested too deeply") from None
    finally:
        if loader is not None:
            loader.dispose()


def dump(values: Mapping[str, object]) -> str:
    """``values`` as YAML that `load` reads back to the same; ASCII, whatever the terminal is."""
    return yaml.dump(
        dict(values), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=10_000
    )


def _value(node: yaml.Node, path: str, source: str) -> object:
    kind = node.tag.removeprefix(_TAG)
    if isinstance(node, yaml.MappingNode) and kind == "map":
        return _mapping(node, path, source)
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        return [_value(item, f"{path}[{n}]", source) for n, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode) and kind == "str":
        return str(node.value)
    if not isinstance(node, yaml.ScalarNode) or kind not in _SCALARS:
        raise OptionError(f"{_at(source, path)} has the tag {node.tag!r}, tags are not read")
    if not _SCALARS[kind].fullmatch(node.value):
        raise OptionError(f"{_at(source, path)}: {node.value!r} is no {kind}")
    if kind == "null":
        return None
    if kind == "bool":
        return node.value.lower() == "true"
    return int(node.value) if kind == "int" else float(node.value)


def _mapping(node: yaml.MappingNode, path: str, source: str) -> dict[str, object]:
    values: dict[str, object] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise OptionError(
                f"{_at(source, path)}: line {key.start_mark.line + 1}: a key must be text"
            )
        inner = f"{path}.{key.value}" if path else key.value
        if key.value in values:
            line = key.start_mark.line + 1
            raise OptionError(f"{source}: {inner} is given twice, again in line {line}")
        values[key.value] = _value(value, inner, source)
    return values


def _at(source: str, path: str) -> str:
    return f"{source}: {path or 'it'}"
