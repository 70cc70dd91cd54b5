"""The tensors of a report: what was measured of each, as plain values of few digits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.curves import Curve, Point, Profile
from calib.report.document import number
from calib.table import CalibrationTable, TensorRecord

_DIGITS = 5  # more than a chart can show, and half the size of all


def tensor_entries(
    profiles: Sequence[Profile], tables: Mapping[tuple[str, int], CalibrationTable]
) -> list[dict[str, Any]]:
    """One entry for each profile, with the results of every table that quantizes it.

    Args:
        tables: by method and width.
    """
    found: dict[str, dict[tuple[str, int], TensorRecord]] = {}
    for key, table in tables.items():
        for record in table.records:
            found.setdefault(record.name, {})[key] = record
    return [_entry(profile, found[profile.name]) for profile in profiles if profile.name in found]


def _entry(profile: Profile, records: Mapping[tuple[str, int], TensorRecord]) -> dict[str, Any]:
    first = next(iter(records.values()))
    return {
        "name": profile.name,
        "kind": first.spec.kind,
        "granularity": str(first.spec.granularity),
        "groups": len(first.threshold),
        "consumers": list(first.spec.consumers),
        "max_abs": _short(first.max_abs),
        "count": first.count,
        "signed": profile.signed,
        "relative": profile.relative,
        "histogram": {"edges": _shorts(profile.edges), "counts": profile.counts.tolist()},
        "results": [_result(profile, *key, record) for key, record in records.items()],
        "s": _shorts(profile.curves[0].thresholds),
        "curves": list(_curves(profile, records)),
        "notes": list(dict.fromkeys(note for r in records.values() for note in r.notes)),
    }


def _result(profile: Profile, method: str, bits: int, record: TensorRecord) -> dict[str, Any]:
    """Thresholds in the profile's unit: of many channels the median, the least and the largest."""
    found = record.threshold
    if profile.relative:
        found = found / profile.largest
    return {
        "method": method,
        "bits": bits,
        "actual_bits": record.qtype.bits,
        "threshold": _short(float(np.median(found))),
        "low": _short(float(found.min())),
        "high": _short(float(found.max())),
        "sqnr_db": record.sqnr_db and round(record.sqnr_db, 3),
    }


def _curves(
    profile: Profile, records: Mapping[tuple[str, int], TensorRecord]
) -> Iterator[dict[str, Any]]:
    """One for each width that was asked for, at the width that the tensor then has."""
    found = {curve.bits: curve for curve in profile.curves}
    for bits, actual in {bits: record.qtype.bits for (_, bits), record in records.items()}.items():
        yield {"bits": bits, "actual_bits": actual, **_curve(found[actual])}


def _curve(curve: Curve) -> dict[str, Any]:
    second = curve.second
    return {
        "measured": _shorts(curve.measured),
        "model": _shorts(curve.modelled),
        "minima": [_point(point) for point in curve.minima],
        "second": second and {"small": _point(second[0]), "large": _point(second[1])},
    }


def _point(point: Point) -> dict[str, Any]:
    return {"s": _short(point.threshold), "mse": _short(point.mse)}


def _shorts(values: NDArray[np.floating]) -> list[float | None]:
    return [_short(float(value)) for value in values]


def _short(value: float) -> float | None:
    return number(float(f"{value:.{_DIGITS}g}"))
