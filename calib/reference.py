"""The float model's outputs, computed once, to compare any number of quantized models with."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import zip_longest

import numpy as np

from calib.arrays import Batch
from calib.capture import Runtime, Session, Source, Values
from calib.comparison import Comparison, Scores, Totals
from calib.errors import DataError, OutputError, one_line
from calib.graph import Model
from calib.metric import load_metric, score


@contextmanager
def _keeping() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{tempfile.gettempdir()}: outputs of the float model cannot be kept: "
            f"{one_line(error)}; let TMPDIR name a folder with room"
        ) from error


class Reference:
    """Outputs of the float model on some samples. They lie on disk, in a file without a name, so
    that memory does not grow with the number of samples.

    Args:
        model: the float model, which is run once.
        batches: gives the same batches at every call.
        runtime: how to execute.
        metric: ``package.module:function`` to judge all models by, see `calib.metric`.
        first: gives the number of the first sample, for error messages.

    Raises:
        DataError: if the data holds NaN or infinity, or the metric fails.
        OutputError: if the disk is full.
    """

    def __init__(
        self,
        model: Model,
        batches: Callable[[], Iterator[Batch]],
        runtime: Runtime | None = None,
        *,
        metric: str | None = None,
        first: Callable[[], int] = int,
    ):
        self._model, self._batches, self._runtime = model, batches, runtime
        self._metric, self._first = metric, first
        self._names: list[tuple[str, ...]] = []
        self.n_samples = 0
        with _keeping():
            self._tape = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as this does
        try:
            self.score = self._recorded()
        except BaseException:
            self._tape.close()
            raise

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *_: object) -> None:
        self._tape.close()

    def compare(self, quantized: Source) -> Comparison:
        """The float model against another one, at onnxruntime's default level.

        Raises:
            VerificationError: if an output holds NaN.
            ModelError: if onnxruntime cannot load or run it.
            DataError: as the class, if labels do not fit, or there are other batches than before.
        """
        session = self._session(quantized)
        totals = Totals()
        self._tape.seek(0)
        for batch, names in zip_longest(self._batches(), self._names):
            if batch is None or names is None:
                raise DataError("the data gives more or fewer batches at every pass")
            expected = {name: np.lib.format.read_array(self._tape) for name in names}
            totals.add(batch, expected, session.run(batch.feed, batch.restart))
        comparison = totals.comparison()
        found = self._score(session)
        if self._metric is None or self.score is None or found is None:
            return comparison
        return replace(comparison, scores=Scores(self._metric, self.score, found))

    def _recorded(self) -> float | None:
        """Fills the tape; the float model's score."""
        session = self._session(self._model.path)
        for batch in self._batches():
            batch.check_finite(self._first() + self.n_samples)
            self.n_samples += batch.n_samples
            self._record(session.run(batch.feed, batch.restart))
        return self._score(session)

    def _session(self, model: Source) -> Session:
        return Session(model, self._runtime, feedback=self._model.feedback)

    def _record(self, outputs: Values) -> None:
        with _keeping():
            for array in outputs.values():
                np.lib.format.write_array(self._tape, np.asarray(array), allow_pickle=False)
        self._names.append(tuple(outputs))

    def _score(self, session: Session) -> float | None:
        if self._metric is None:
            return None
        return score(load_metric(self._metric), self._metric, session, self._batches())
