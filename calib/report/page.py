"""A document of results as one HTML page that needs nothing else: no network, no other file.

The page carries plotly.js, its own style and script, and the document as JSON; everything that is
shown is built from that JSON in the browser.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

from calib.errors import OptionError

# Significant digits of what is printed, and of what is only drawn: most of a large document.
_DIGITS = 7
_DRAWN = {"edges": 4, "s": 4, "measured": 3, "model": 3}


def render_page(document: Mapping[str, Any]) -> str:
    """The text of a page that shows ``document``, a result of schema 1.

    Numbers are rounded to seven significant digits, those of curves and histograms to three or
    four; what is not finite is shown as missing.

    Raises:
        OptionError: Plotly is not installed.
    """
    check_available()
    # An extra, and heavy.
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]  # noqa: PLC0415

    parts = {
        "title": html.escape(str(document["title"])).encode("ascii", "xmlcharrefreplace").decode(),
        "style": _file("page.css"),
        "plotly": get_plotlyjs(),
        "document": _script_json(document),
        **{name: _file(f"{name}.js") for name in ("elements", "charts", "page")},
    }
    # One pass: what a part holds is never taken for a placeholder.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _file("page.html"))


def check_available() -> None:
    """Raises `OptionError` if no page can be made: to be told before the work, not after it."""
    if find_spec("plotly") is None:
        raise OptionError("report: needs plotly: pip install 'octav-calibrate[report]'")


def _file(name: str) -> str:
    """One of the files beside this one."""
    return files(__package__).joinpath(name).read_text("utf-8")


def _script_json(document: Mapping[str, Any]) -> str:
    """``document`` as JSON that no name in it can end: ASCII, without ``<``."""
    text = json.dumps(_rounded(document), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _rounded(value: Any, digits: int = _DIGITS) -> Any:
    """``value`` with its floats rounded, and None for those that JSON does not have."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _rounded(item, _DRAWN.get(key, _DIGITS)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item, digits) for item in value]
    return value
