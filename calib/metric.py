"""The user's own metric: a function over what a model answers to the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from calib.arrays import Batch
from calib.capture import Session, Values
from calib.errors import CalibError, DataError, OptionError, one_line
from calib.iterables import import_function
from calib.readers import is_function

Answers = Iterator[tuple[Values, Values, Any]]
Metric = Callable[[Answers], float]

_LONGEST_QUOTE = 60


def load_metric(name: str) -> Metric:
    """The function that ``package.module:function`` names.

    It is called once for each model with an iterator of ``(outputs, feed, labels)``, a batch at a
    time: arrays by name, arrays by name, and the batch's labels or None. It returns a number;
    larger is better.

    Raises:
        OptionError: if ``name`` has another form.
        DataError: if it cannot be imported.
    """
    if not is_function(name):
        raise OptionError(f"metric must be package.module:function, got {name!r}")
    metric: Metric = import_function(name)
    return metric


def score(metric: Metric, name: str, session: Session, batches: Iterable[Batch]) -> float:
    """What ``metric`` says of the model in ``session`` on ``batches``.

    Raises:
        DataError: if it raises, or returns anything but a finite number.
        CalibError: as the session and the data do, which is not the metric's fault.
    """
    try:
        returned = metric(_answers(session, batches))
    except (CalibError, MemoryError):
        raise
    except Exception as error:  # whatever the function raises
        raise DataError(f"metric {name}: {type(error).__name__}: {one_line(error)}") from error
    try:
        value = float(returned)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        shown = one_line(repr(returned))[:_LONGEST_QUOTE]
        raise DataError(f"metric {name}: must return a finite number, got {shown}")
    return value


def _answers(session: Session, batches: Iterable[Batch]) -> Answers:
    for batch in batches:
        yield session.run(batch.feed, batch.restart), dict(batch.feed), batch.labels
