"""The calibration table of a trained model: thresholds from its quantizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from calib.arrays import Batch
from calib.distribution import Distribution, Floats, Histogram, Samples
from calib.errors import VerificationError
from calib.granularity import PerTensor, along_tensor, to_groups
from calib.graph import Model, Skipped, Use, quantizable_uses
from calib.observing import observe
from calib.planning import TensorSpec
from calib.qat.estimators import LEARNED
from calib.qat.marking import Places
from calib.qat.quantizer import Quantizer
from calib.quantize import scale_from_threshold
from calib.table import CalibrationTable, TensorRecord, decibels

# Of a step: folding a BatchNormalization rounds to float32, nothing else moves a weight.
_OFF_GRID = 1e-2


@dataclass(frozen=True, slots=True)
class FrozenWeight:
    """What is known of a weight before folding.

    Attributes:
        largest: the largest magnitude of each channel's integers, ``(G,)``.
        sqnr_db: of the weight on its grid, the trained float one as reference.
    """

    largest: Floats
    sqnr_db: float | None


@dataclass(frozen=True, slots=True)
class Trained:
    """What training left: quantizers, and their weights where they are of weights, by name."""

    quantizers: Mapping[str, Quantizer]
    weights: Mapping[str, FrozenWeight]


def trained_table(model: Model, places: Places, trained: Trained, batch: Batch) -> CalibrationTable:
    """One record for each tensor that a quantizer stands for, in graph order.

    Args:
        model: exported in float, its weights on their grids.
        places: (node, input position) → name of the quantizer.
        trained: what they learned.
        batch: to fill in the figures of activations from.

    Raises:
        VerificationError: if a weight is not on the grid that it was trained on.
    """
    uses, skipped = quantizable_uses(model)
    nodes = {str(node.name): node for node in model.ir.graph}
    chosen: dict[str, tuple[Quantizer, list[Use]]] = {}
    left_out: list[Skipped] = []
    for use in uses:
        name = _name(nodes[use.node], use, places)
        if name is None:
            left_out.append(Skipped(f"{use.tensor} of {use.node}", "not quantized in training"))
        else:
            chosen.setdefault(use.tensor, (trained.quantizers[name], []))[1].append(use)
    activations = [name for name, (_, its) in chosen.items() if its[0].kind == "activation"]
    seen = observe(model, [batch], activations)
    records = []
    for tensor, (quantizer, its_uses) in chosen.items():
        if quantizer.settings.is_weight:
            frozen = trained.weights[quantizer.settings.name]
            records.append(_weight(model, quantizer, frozen, its_uses))
        elif its_uses[0].kind == "weight":  # a parameter that a `calib.qat.MatMul` reads
            samples = Samples(to_groups(model.weight(tensor), PerTensor()))
            records.append(_operand(samples, quantizer, its_uses))
        else:
            histogram = Histogram(seen.counters[tensor])
            records.append(_operand(histogram, quantizer, its_uses))
    return CalibrationTable(model.sha256, batch.n_samples, tuple(records), (*left_out, *skipped))


def _name(node: Any, use: Use, places: Places) -> str | None:
    """The quantizer of the input of ``node`` that ``use`` is about."""
    for position, value in enumerate(node.inputs[:2]):
        if value is not None and value.name == use.tensor and (use.node, position) in places:
            return places[use.node, position]
    return None


def _operand(dist: Distribution, quantizer: Quantizer, uses: Sequence[Use]) -> TensorRecord:
    """With one threshold, from an activation's quantizer."""
    threshold = quantizer.current().double().numpy()
    qtype = quantizer.qtype
    signal = float(dist.rms()[0]) ** 2
    return TensorRecord(
        spec=_spec(quantizer, uses),
        qtype=qtype,
        threshold=threshold,
        scale=scale_from_threshold(threshold, qtype),
        max_abs=float(dist.max_abs()[0]),
        count=int(dist.count()[0]),
        sqnr_db=decibels(signal, float(dist.mse(threshold, qtype)[0])),
        notes=("trained; figures are those of the example inputs",),
    )


def _weight(
    model: Model, quantizer: Quantizer, frozen: FrozenWeight, uses: Sequence[Use]
) -> TensorRecord:
    """Scales from the weight itself: what was folded into it changed them, and not the integers
    but for their sign."""
    spec, qtype = _spec(quantizer, uses), quantizer.qtype
    weight = model.weight(spec.name)
    magnitude = np.abs(to_groups(weight, spec.granularity).astype(np.float64)).max(axis=1)
    if len(magnitude) != len(frozen.largest):
        raise VerificationError(
            f"weight {spec.name!r} ({quantizer.settings.name}): has {len(magnitude)} channels in "
            f"the exported graph, {len(frozen.largest)} in training; please report the model"
        )
    known = (magnitude > 0) & (frozen.largest > 0)
    scale = np.where(known, magnitude / np.maximum(frozen.largest, 1), 1.0).astype(np.float32)
    levels = weight / along_tensor(scale, weight.shape, spec.granularity)
    off = float(np.abs(levels - np.rint(levels)).max(initial=0.0))
    if off > _OFF_GRID or np.abs(levels).max(initial=0.0) > qtype.qmax + 0.5:
        raise VerificationError(
            f"weight {spec.name!r} ({quantizer.settings.name}): the exporter moved it off its "
            f"grid by {off:.3f} of a step; please report the model"
        )
    return TensorRecord(
        spec=spec,
        qtype=qtype,
        threshold=scale.astype(np.float64) * qtype.steps,
        scale=scale,
        max_abs=float(magnitude.max(initial=0.0)),
        count=weight.size,
        sqnr_db=frozen.sqnr_db,
        notes=("trained",),
    )


def _spec(quantizer: Quantizer, uses: Sequence[Use]) -> TensorSpec:
    settings = quantizer.settings
    learned = settings.gradient in LEARNED
    return TensorSpec(
        uses[0].tensor,
        uses[0].kind,
        settings.bits,
        uses[0].granularity if settings.is_weight else PerTensor(),
        consumers=tuple(dict.fromkeys(use.node for use in uses)),
        method=settings.gradient if learned else settings.calibrator,
        dtype=uses[0].dtype,
    )
