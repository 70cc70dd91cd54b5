"""A check as Markdown, for a job summary or a comment on a merge request."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_MARKS = {True: "✅ holds", False: "❌ **FAILS**"}
_PUNCTUATION = re.compile(r"([\\`*_{}\[\]<>|#~&$@])")


def render_markdown(document: Mapping[str, Any]) -> str:
    """The verdict, a table of bounds, a table of outputs, the tensor that stands out, and what
    else there is to know, in GitHub's and GitLab's Markdown.

    Args:
        document: of a check, see `calib.gate.Check.document`.
    """
    check = document["check"]
    word = "✅ PASSED" if check["passed"] else "❌ FAILED"
    blocks = [f"## octav-check: {word}", _subject(document)]
    if check["verdicts"]:
        blocks.append("\n".join(_bounds(check["verdicts"])))
    if check["outputs"]:
        blocks.append("\n".join(_outputs(check["outputs"])))
    blocks.extend(_accuracy(check))
    if check["first_text"]:
        blocks.append(_sentence(check["first_text"]))
    lists = {"Warning": document["warnings"], "Note": document["notes"]}
    told = [f"- {kind}: {_text(line)}" for kind, lines in lists.items() for line in lines]
    if told:
        blocks.append("\n".join(told))
    return "\n\n".join(blocks) + "\n"


def _subject(document: Mapping[str, Any]) -> str:
    check, samples = document["check"], document["samples"]
    sizes = [check[which]["n_bytes"] for which in ("quantized", "float")]
    unseen = " that calibration did not see" if samples["held_out"] else ""
    n = samples["evaluation"]
    where = f", on {n} samples{unseen}" if n is not None else ""
    return (
        f"{_code(check['quantized']['name'])} ({sizes[0] / 1000:,.0f} kB, "
        f"{sizes[0] / sizes[1]:.0%} of the float model's size) against "
        f"{_code(check['float']['name'])}{where}."
    )


def _bounds(verdicts: list[Mapping[str, Any]]) -> Iterator[str]:
    yield "| bound | | found |"
    yield "|---|---|---|"
    for verdict in verdicts:
        found = verdict["text"].partition(": ")[2]
        yield f"| {_cell(verdict['bound'])} | {_MARKS[verdict['holds']]} | {_text(found)} |"


def _outputs(outputs: list[Mapping[str, Any]]) -> Iterator[str]:
    yield "| output | SQNR, dB | cosine | largest error |"
    yield "|---|--:|--:|--:|"
    for output in outputs:
        cells = (
            _figure(output["sqnr_db"], ".1f"),
            _figure(output["cosine"], ".6g"),
            _figure(output["max_error"], ".4g"),
        )
        yield f"| {_cell(output['name'])} | {' | '.join(cells)} |"


def _accuracy(check: Mapping[str, Any]) -> Iterator[str]:
    parts = []
    if check["agreement"] is not None:
        parts.append(f"agreement {check['agreement']:.2%}")
    for key, unit in (("top1", " %"), ("metric", "")):
        found = check[key]
        if found is not None:
            name = "top-1" if key == "top1" else _code(found["name"])
            spec = ".2f" if key == "top1" else ".6g"
            parts.append(
                f"{name}: float {found['float']:{spec}}{unit}, quantized "
                f"{found['quantized']:{spec}}{unit}"
            )
    if parts:
        yield _sentence("; ".join(parts), escape=False)


def _sentence(text: str, escape: bool = True) -> str:
    told = _text(text) if escape else text
    return f"{told[:1].upper()}{told[1:]}."


def _figure(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)  # noqa: RUF001 - an empty cell


def _code(name: str) -> str:
    """``name`` as code, whatever is in it."""
    plain = _line(name)
    longest = max((len(run) for run in re.findall("`+", plain)), default=0)
    if not plain.strip():
        return "` `"
    pad = " " if "`" in (plain[0], plain[-1]) else ""
    fence = "`" * (longest + 1)
    return f"{fence}{pad}{plain}{pad}{fence}"


def _cell(name: str) -> str:
    """As code in a table, where a pipe would end the cell even there."""
    return _code(name).replace("|", "\\|")


def _text(text: str) -> str:
    """Prose that may hold names: nothing in it is markup."""
    return _PUNCTUATION.sub(r"\\\1", _line(text))


def _line(text: str) -> str:
    """One line of characters that can be shown."""
    return "".join(char if char.isprintable() else " " for char in text)
