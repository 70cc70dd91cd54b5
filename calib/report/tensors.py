"""The tensors of a report: what was measured of each, as plain values of few digits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """One entry for each profile, with the results of every table in it.

    Args:
        tables: by method and width.
    """
    records = {key: {r.name: r for r in table.records} for key, table in tables.items()}
    return [
        _entry(profile, {key: found[profile.name] for key, found in records.items()})
        for profile in profiles
        if all(profile.name in found for found in records.values())
    ]


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
        "curves": [_curve(curve) for curve in profile.curves],
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
        "stored_bits": record.qtype.bits,
        "threshold": _short(float(np.median(found))),
        "low": _short(float(found.min())),
        "high": _short(float(found.max())),
        "sqnr_db": record.sqnr_db and round(record.sqnr_db, 3),
    }


def _curve(curve: Curve) -> dict[str, Any]:
    second = curve.second
    return {
        "bits": curve.bits,
        "s": _shorts(curve.thresholds),
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
