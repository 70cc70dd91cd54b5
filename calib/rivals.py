"""onnxruntime's own calibrators as rows of a comparison.

Only their ranges are theirs: from ``(low, high)`` of an activation comes the threshold
``max(|low|, |high|)`` on our grid, weights get their maximum, as onnxruntime gives them, and the
model is written by the same writer, so that rows differ in thresholds alone.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort  # type: ignore[import-untyped, unused-ignore]
from onnxruntime.quantization import (  # type: ignore[import-untyped, unused-ignore]
    calibrate as theirs,
)

from calib.arrays import Batch
from calib.calibration import calibrate_with
from calib.calibrators import Calibrator, make
from calib.capture import Runtime, Session
from calib.distribution import Distribution, Floats
from calib.errors import CalibError, DataError, ModelError, OptionError, one_line
from calib.graph import Model, Skipped
from calib.observations import Observations
from calib.planning import Plan
from calib.qtypes import QuantType
from calib.rules import Rules
from calib.table import CalibrationTable

RIVALS = ("onnxruntime:minmax", "onnxruntime:entropy", "onnxruntime:percentile")

Ranges = Mapping[str, tuple[float, float]]

_SEVERITY_FATAL = 4
_MOST_INLINE_BYTES = 1_500_000_000  # protobuf ends at 2 GB
_AS_ROUNDING = 1e-3  # between a graph that is optimized and one that is not
# Of its 128 bins, entropy merges all that there are into 128 levels and can choose the maximum
# alone; TensorRT has as many as percentile. All else is as onnxruntime has it: percentile:99.999.
_BINS = 2048
_FLOAT16_BINS = 512  # NumPy refuses edges that float16 cannot tell apart
_CLASSES = dict(
    zip(RIVALS, ("MinMaxCalibrater", "EntropyCalibrater", "PercentileCalibrater"), strict=True)
)


def rival_ranges(
    model: Model,
    batches: Callable[[], Iterable[Batch]],
    names: Sequence[str],
    runtime: Runtime | None = None,
    methods: Sequence[str] = RIVALS,
) -> dict[str, Ranges]:
    """What each of onnxruntime's calibrators says of the activations ``names``: ``(low, high)``.

    It runs the model once for each method, without graph optimisation. `onnxruntime:entropy` and
    `onnxruntime:percentile` keep all values of these activations in memory at once: give the
    calibration samples alone, and not too many. Padding is counted. Batches of other shapes than
    those before are collected by a further call, as onnxruntime stacks those of one.

    Args:
        model: the prepared graph is what runs.
        batches: called for each method.
        names: activations; one that onnxruntime gives no finite range for is left out.
        runtime: provider, threads and custom operators.
        methods: of `RIVALS`.

    Raises:
        OptionError: if there is no such method.
        DataError: if there are no batches.
        ModelError: if onnxruntime fails, or there is no room for working copies of the model.
    """
    unknown = [method for method in methods if method not in RIVALS]
    if unknown:
        raise OptionError(
            f"no calibrator {unknown[0]!r} of onnxruntime's, only {', '.join(RIVALS)}"
        )
    found: dict[str, Ranges] = {}
    for method in methods:
        with _one_line(method), tempfile.TemporaryDirectory(prefix="octav-calibrate-") as folder:
            calibrator = _calibrator(model, method, names, Path(folder), runtime or Runtime())
            n_calls = 0
            for feeds in _stackable(model, batches(), runtime):
                calibrator.collect_data(_Reader(feeds))
                n_calls += 1
            if n_calls == 0:
                raise DataError("the calibration data holds no samples")
            data = calibrator.compute_data()
            found[method] = dict(_ranges(data, names))
    return found


def rival_table(
    model: Model, observations: Observations, plan: Plan, ranges: Ranges, method: str
) -> CalibrationTable:
    """The table of ``plan`` with the thresholds of ``ranges``, one of those that `rival_ranges`
    gave; SQNR comes from the ``observations``, as in every table.

    Thresholds above the maximum that was observed become the maximum, with a note where they are
    by more than 0.1 %: the unoptimized graph rounds otherwise. An activation without a range stays
    float, with the reason.
    """
    known, skipped, calibrators = [], [], dict[str, Calibrator]()
    for spec in plan.specs:
        if spec.kind == "weight":
            known.append(replace(spec, method="max"))
            calibrators[spec.name] = make("max")
        elif spec.name in ranges:
            known.append(replace(spec, method=method))
            calibrators[spec.name] = _Given(max(map(abs, ranges[spec.name])))
        else:
            skipped.append(Skipped(spec.name, f"{method} gives no range for it"))
    mine = Plan(tuple(known), (*plan.skipped, *skipped))
    return calibrate_with(model, observations, mine, Rules(), calibrators)


@dataclass(frozen=True, slots=True)
class _Given:
    """A threshold that is known already."""

    threshold: float

    def __call__(self, dist: Distribution, _qtype: QuantType, /) -> Floats:
        largest = dist.max_abs()
        same = (largest < self.threshold) & (self.threshold <= largest * (1 + _AS_ROUNDING))
        return np.where(same, largest, self.threshold)


@contextmanager
def _one_line(method: str) -> Iterator[None]:
    """What onnxruntime prints and warns of is not shown; what it raises is a `ModelError`."""
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    except (CalibError, MemoryError):
        raise
    except Exception as error:  # whatever shape inference, NumPy and the runtime raise
        raise ModelError(f"{method} fails on this model or data: {one_line(error)}") from error


def _calibrator(
    model: Model, method: str, names: Sequence[str], folder: Path, runtime: Runtime
) -> Any:
    """One of onnxruntime's calibrators, ready to collect ``names`` and nothing else."""
    source, augmented = folder / "model.onnx", folder / "augmented.onnx"
    values = [v.const_value for g in model.ir.graphs() for v in g.initializers.values()]
    large = sum(t.nbytes for t in values if t is not None) > _MOST_INLINE_BYTES
    apart = large or any(isinstance(t, ir.ExternalTensor) for t in values)
    ir.save(model.ir, source, external_data="model.data" if apart else None)
    calibrator = getattr(theirs, _CLASSES[method])(
        source,
        augmented_model_path=str(augmented),
        use_external_data_format=large,
        symmetric=True,
        **({} if method == RIVALS[0] else {"num_bins": _n_bins(model, names)}),
    )
    selected, infos = calibrator.select_tensors_to_calibrate(calibrator.model)
    wanted = selected.intersection(names)
    calibrator.select_tensors_to_calibrate = lambda _model: (wanted, infos)
    calibrator.augment_graph()
    options = ort.SessionOptions()
    options.log_severity_level = _SEVERITY_FATAL
    options.intra_op_num_threads = runtime.threads
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    for library in runtime.custom_ops:
        options.register_custom_ops_library(str(library.absolute()))
    providers = [runtime.provider or "CPUExecutionProvider"]
    calibrator.infer_session = ort.InferenceSession(str(augmented), options, providers=providers)
    return calibrator


def _n_bins(model: Model, names: Sequence[str]) -> int:
    inner = (value for node in model.ir.graph for value in node.outputs)
    types = {value.name: value.dtype for value in (*model.ir.graph.inputs, *inner)}
    halves = any(types.get(name) is ir.DataType.FLOAT16 for name in names)
    return _FLOAT16_BINS if halves else _BINS


def _stackable(
    model: Model, batches: Iterable[Batch], runtime: Runtime | None
) -> Iterator[Iterator[dict[str, Any]]]:
    """Feeds, what is fed back among them, in runs of equal shapes."""
    state = Session(model.ir, runtime, values=[*model.feedback], feedback=model.feedback)

    def feeds() -> Iterator[dict[str, Any]]:
        for batch in batches:
            yield {**batch.feed, **(state.run(batch.feed, batch.restart) if model.feedback else {})}

    def shapes(feed: dict[str, Any]) -> list[tuple[int, ...]]:
        return [array.shape for array in feed.values()]

    return (run for _, run in groupby(feeds(), shapes))


@dataclass(frozen=True, slots=True)
class _Reader:
    """What onnxruntime calls a CalibrationDataReader."""

    feeds: Iterator[dict[str, Any]]

    def get_next(self) -> dict[str, Any] | None:
        return next(self.feeds, None)


def _ranges(data: Any, names: Sequence[str]) -> Iterator[tuple[str, tuple[float, float]]]:
    for name in names:
        if name in data:
            low, high = (float(np.ravel(bound)[0]) for bound in data[name].range_value)
            if math.isfinite(low) and math.isfinite(high):
                yield name, (low, high)
