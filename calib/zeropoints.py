"""From a symmetric threshold to an unsigned grid with a zero point."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from calib.counter import Counter
from calib.distribution import Histogram
from calib.graph import Model
from calib.qtypes import QuantType
from calib.quantize import scale_from_threshold
from calib.table import TensorRecord, decibels


def unsigned_grid(low: float, high: float, bits: int) -> tuple[QuantType, float]:
    """The unsigned grid that holds ``low … high`` and 0, and its threshold (the farther end).

    The zero point is an integer; the scale is then as small as both ends allow, so that no value
    between them is clipped.
    """
    low, high, levels = min(low, 0.0), max(high, 0.0), (1 << bits) - 1
    zero_point = round(-low * levels / (high - low)) if high > low else 0
    zero_point = min(max(zero_point, int(low < 0)), levels - int(high > 0))
    ends = [end / n for end, n in ((-low, zero_point), (high, levels - zero_point)) if n]
    qtype = QuantType(bits, signed=False, zero_point=zero_point)
    return qtype, max(ends) * qtype.steps or 1.0


def shifted(record: TensorRecord, model: Model) -> TensorRecord:
    """``record`` on an unsigned grid with a zero point, where it is a constant of ``model`` that
    shall have one: from its minimum to its maximum, neither beyond the threshold it had."""
    if record.spec.kind != "weight" or record.spec.grid != "asymmetric":
        return record
    counter = Counter()
    counter.update(model.weight(record.name))
    most = float(record.threshold[0])
    low, high = max(counter.min, -most), min(counter.max, most)
    qtype, threshold = unsigned_grid(low, high, record.qtype.bits)
    limits = np.array([threshold])
    dist = Histogram(counter)
    signal, noise = dist.rms()[0] ** 2, dist.mse(limits, qtype)[0]
    return replace(
        record,
        qtype=qtype,
        threshold=limits,
        scale=scale_from_threshold(limits, qtype, record.spec.dtype),
        sqnr_db=decibels(float(signal), float(noise)),
    )
