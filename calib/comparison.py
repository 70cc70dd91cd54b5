"""The float model against the quantized one, on the same samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.arrays import Batch
from calib.capture import Runtime, Session
from calib.errors import DataError, ModelError, VerificationError
from calib.graph import Model


@dataclass(frozen=True, slots=True)
class Top1:
    """Share of samples, in percent, whose label has the largest output."""

    float_model: float
    quantized_model: float

    @property
    def drop(self) -> float:
        """In points; negative where the quantized model is better."""
        return self.float_model - self.quantized_model


@dataclass(frozen=True, slots=True)
class Scores:
    """What the user's metric, named ``package.module:function``, says of both models."""

    name: str
    float_model: float
    quantized_model: float

    @property
    def drop(self) -> float:
        """In the metric's unit; negative where the quantized model is better."""
        return self.float_model - self.quantized_model


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far the quantized model's outputs are from the float model's.

    Attributes:
        n_samples: how many samples it was measured on.
        sqnr_db: for each floating-point output; infinite where nothing differs.
        top1: None where the data has no labels, or the model no ``(samples, classes)`` output.
        notes: what the user should know about the comparison.
        cosine: for each floating-point output, of all its values as one vector, -1 to 1.
        max_error: for each floating-point output, the largest difference, in its unit.
        agreement: share of samples, 0 to 1, for which both models' largest value of the first
            ``(samples, classes)`` output is the same; without one, share of equal values of the
            integer outputs; None where there are neither.
        scores: of the user's metric; None where none was asked for.
    """

    n_samples: int
    sqnr_db: Mapping[str, float]
    top1: Top1 | None
    notes: tuple[str, ...] = ()
    cosine: Mapping[str, float] = field(default_factory=dict)
    max_error: Mapping[str, float] = field(default_factory=dict)
    agreement: float | None = None
    scores: Scores | None = None

    @property
    def output_sqnr_db(self) -> float:
        """The lowest SQNR of all outputs."""
        return min(self.sqnr_db.values(), default=math.inf)


@dataclass(slots=True)
class Difference:
    """Running sums: of squares, of squared differences, of the other's squares and of products; and
    the largest difference."""

    signal: float = 0.0
    noise: float = 0.0
    power: float = 0.0
    product: float = 0.0
    largest: float = 0.0

    def add(self, reference: NDArray[Any], other: NDArray[Any]) -> None:
        """Adds two arrays of the same shape; equal infinities are neither signal nor noise."""
        alike = ~np.isfinite(reference) & (reference == other)
        exact = np.where(alike, 0.0, reference.astype(np.float64))
        actual = np.where(alike, 0.0, other.astype(np.float64))
        with np.errstate(invalid="ignore", over="ignore"):  # infinite in only one of them
            error = np.abs(exact - actual)
            self.signal += float(np.square(exact).sum())
            self.noise += float(np.square(error).sum())
            self.power += float(np.square(actual).sum())
            self.product += float((exact * actual).sum())
        self.largest = float(np.maximum(self.largest, error.max(initial=0.0)))

    @property
    def sqnr_db(self) -> float:
        """``10·log10(Σx²/Σ(x-x̂)²)``; infinite without noise, minus infinite without signal or where
        the other is infinite and the reference is not."""
        if self.noise == 0:
            return math.inf
        ratio = self.signal / self.noise
        return 10 * math.log10(ratio) if ratio > 0 else -math.inf

    @property
    def cosine(self) -> float:
        """``Σxy/√(Σx²·Σy²)``; 1 where both are all zero, 0 where one of them is, or is infinite."""
        if self.noise == 0:
            return 1.0
        norm = math.sqrt(self.signal) * math.sqrt(self.power)
        return max(-1.0, min(1.0, self.product / norm)) if 0 < norm < math.inf else 0.0


@dataclass(slots=True)
class _Hits:
    """Running counts of right answers."""

    n: int = 0
    float_model: int = 0
    quantized_model: int = 0

    def top1(self) -> Top1 | None:
        if self.n == 0:
            return None
        return Top1(100 * self.float_model / self.n, 100 * self.quantized_model / self.n)


@dataclass(slots=True)
class Totals:
    """Running sums over batches that make a `Comparison`."""

    differences: dict[str, Difference] = field(default_factory=dict)
    hits: _Hits = field(default_factory=_Hits)
    n_samples: int = 0
    notes: tuple[str, ...] = ()
    same: dict[str, list[int]] = field(default_factory=dict)
    agreed: list[int] = field(default_factory=lambda: [0, 0])

    @property
    def agreement(self) -> float | None:
        """See `Comparison`."""
        pairs = [self.agreed] if self.agreed[1] else list(self.same.values())
        n, of = (sum(column) for column in zip(*pairs, strict=True)) if pairs else (0, 0)
        return n / of if of else None

    def add(
        self,
        batch: Batch,
        expected: Mapping[str, NDArray[Any]],
        actual: Mapping[str, NDArray[Any]],
    ) -> None:
        """Adds both models' outputs of one batch.

        Raises:
            VerificationError, DataError: as `evaluate`.
        """
        for name, reference in expected.items():
            found = _check_there(name, reference, actual)
            if reference.dtype.kind != "f":
                same = self.same.setdefault(name, [0, 0])
                same[0] += int(np.count_nonzero(reference == found))
                same[1] += reference.size
                continue
            check_nan(name, reference, found)
            self.differences.setdefault(name, Difference()).add(reference, found)
        self.n_samples += batch.n_samples
        floats = (n for n, a in expected.items() if a.dtype.kind == "f" and a.ndim == 2)
        logits = next(floats, None)
        if logits is not None:
            self._add_logits(batch.labels, logits, expected[logits], actual[logits])
        elif batch.labels is not None:
            self.notes = ("labels are not used: no output of shape (samples, classes)",)

    def _add_logits(
        self, labels: NDArray[Any] | None, name: str, expected: NDArray[Any], actual: NDArray[Any]
    ) -> None:
        n_classes = expected.shape[1]
        if n_classes > 1:
            alike = expected.argmax(axis=1) == actual.argmax(axis=1)
            self.agreed[0] += int(np.count_nonzero(alike))
            self.agreed[1] += len(alike)
        if labels is None:
            return
        if labels.shape != expected.shape[:1]:
            raise DataError(
                f"labels have shape {labels.shape}, the model's {name!r} {expected.shape}: one "
                f"label for each sample is needed"
            )
        outside = labels[(labels < 0) | (labels >= n_classes)]
        if outside.size:
            raise DataError(
                f"label {int(outside[0])}: the model's {name!r} has {n_classes} classes, 0 to "
                f"{n_classes - 1}"
            )
        self.hits.n += len(labels)
        self.hits.float_model += int((expected.argmax(axis=1) == labels).sum())
        self.hits.quantized_model += int((actual.argmax(axis=1) == labels).sum())

    def comparison(self) -> Comparison:
        """What was gathered."""
        alike = tuple(
            f"output {name!r}, no float: {n / max(of, 1):.2%} of its values are equal"
            for name, (n, of) in self.same.items()
        )
        return Comparison(
            self.n_samples,
            {name: difference.sqnr_db for name, difference in self.differences.items()},
            self.hits.top1(),
            (*self.notes, *alike),
            cosine={name: difference.cosine for name, difference in self.differences.items()},
            max_error={name: difference.largest for name, difference in self.differences.items()},
            agreement=self.agreement,
        )


def evaluate(
    model: Model,
    quantized: Path,
    batches: Iterable[Batch],
    runtime: Runtime | None = None,
    first: int = 0,
) -> Comparison:
    """Runs the original float model and the one at ``quantized`` over all batches, both at
    onnxruntime's default level.

    Args:
        first: number of the first sample, for error messages.

    Raises:
        VerificationError: if an output of the quantized model holds NaN, or has another shape.
        ModelError: if onnxruntime cannot load or run one of them; the message names its file.
        DataError: if the data holds NaN or infinity, or labels are not one for each sample.
    """
    sessions = {}
    for path in dict.fromkeys((model.path, quantized)):
        with _naming(path):
            sessions[path] = Session(path, runtime, feedback=model.feedback)
    totals = Totals()
    for batch in batches:
        batch.check_finite(first + totals.n_samples)
        answers = {}
        for path, session in sessions.items():
            with _naming(path):
                answers[path] = session.run(batch.feed, batch.restart)
        totals.add(batch, answers[model.path], answers[quantized])
    return totals.comparison()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Says which of the two models an error is about."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{path.name}: {error}") from error


def _check_there(
    name: str, reference: NDArray[Any], actual: Mapping[str, NDArray[Any]]
) -> NDArray[Any]:
    if name not in actual:
        raise VerificationError(f"output {name!r} was not produced by the quantized model")
    if actual[name].shape != reference.shape:
        raise VerificationError(
            f"output {name!r} of the quantized model has shape {list(actual[name].shape)}, the "
            f"float model's {list(reference.shape)}, on the same data"
        )
    return actual[name]


def check_nan(name: str, reference: NDArray[Any], actual: NDArray[Any]) -> None:
    """Raises if an output holds NaN: `DataError` if the float model's does, `VerificationError`
    if only the quantized one's does."""
    if np.isnan(reference).any():
        raise DataError(
            f"output {name!r} of the float model holds NaN on this data: is it preprocessed as "
            f"the model wants it?"
        )
    if np.isnan(actual).any():
        raise VerificationError(f"output {name!r} of the quantized model holds NaN")
