"""The calibration table: every quantized tensor's parameters, and where they came from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.distribution import Floats
from calib.errors import ModelError
from calib.granularity import PerChannel, PerTensor
from calib.graph import Model, Skipped
from calib.planning import TensorSpec
from calib.qtypes import QuantType

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One quantized tensor.

    Attributes:
        spec: what it is, and who reads it.
        qtype: its grid.
        threshold: float64 ``(G,)``, in the tensor's unit, all positive.
        scale: float32 ``(G,)``, ``threshold / qtype.steps``.
        max_abs: largest magnitude of the whole tensor.
        count: how many values were seen.
        sqnr_db: signal to quantization noise; None where there is no signal, or no noise.
        notes: what was done that was not asked for, and how a figure came about.
    """

    spec: TensorSpec
    qtype: QuantType
    threshold: Floats
    scale: NDArray[np.float32]
    max_abs: float
    count: int
    sqnr_db: float | None
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.spec.name

    def to_json(self) -> dict[str, Any]:
        """Plain values; per-channel vectors as lists, of blocks, which may be millions, the
        number, the least and the largest."""
        return {
            "name": self.name,
            "kind": self.spec.kind,
            "dtype": self.spec.dtype,
            "method": self.spec.method,
            "bits": self.qtype.bits,
            "signed": self.qtype.signed,
            "granularity": str(self.spec.granularity),
            "threshold": self._plain(self.threshold),
            "scale": self._plain(self.scale),
            "zero_point": self.qtype.zero_point,
            "max_abs": self.max_abs,
            "count": self.count,
            "sqnr_db": self.sqnr_db,
            "consumers": list(self.spec.consumers),
            **({"shares": list(self.spec.shares)} if self.spec.shares else {}),
            "notes": list(self.notes),
        }

    def _plain(self, per_group: NDArray[np.floating]) -> object:
        if isinstance(self.spec.granularity, PerTensor):
            return float(per_group[0])
        if isinstance(self.spec.granularity, PerChannel):
            return per_group.tolist()
        ends = {"min": float(per_group.min()), "max": float(per_group.max())}
        return {"blocks": per_group.size, **ends}


@dataclass(frozen=True, slots=True)
class CalibrationTable:
    """All records of one model, in graph order.

    Attributes:
        model_sha256: digest of the model that the table belongs to.
        n_samples: how many samples the activations were observed on.
        records: quantized tensors.
        skipped: nodes and tensors that stay float, with reasons.
        manifest: options, versions and digests; goes into the written model too.
        target: the runtime that it was made for.
        bias_corrections: layer → float64 ``(C,)``, what is added to its bias.
    """

    model_sha256: str
    n_samples: int
    records: tuple[TensorRecord, ...]
    skipped: tuple[Skipped, ...]
    manifest: Mapping[str, Any] = field(default_factory=dict)
    target: str = "generic"
    bias_corrections: Mapping[str, Floats] = field(default_factory=dict)

    def check_model(self, model: Model) -> None:
        """Raises `ModelError` if the table was made for another model."""
        if self.model_sha256 != model.sha256:
            raise ModelError(
                f"{model.path}: the calibration table belongs to another model "
                f"(sha256 {self.model_sha256[:12]}..., this one {model.sha256[:12]}...)"
            )

    def with_manifest(self, manifest: Mapping[str, Any]) -> CalibrationTable:
        """The same table with another manifest."""
        return replace(self, manifest=dict(manifest))

    def with_corrections(self, corrections: Mapping[str, Floats]) -> CalibrationTable:
        """The same table with other bias corrections."""
        return replace(self, bias_corrections=dict(corrections))

    def worst(self, n: int) -> tuple[TensorRecord, ...]:
        """The ``n`` records with the lowest SQNR."""
        known = [r for r in self.records if r.sqnr_db is not None]
        return tuple(sorted(known, key=lambda r: r.sqnr_db or 0.0)[:n])

    def to_json(self) -> dict[str, Any]:
        """The table as plain values, ready for `dumps`."""
        return {
            "schema": SCHEMA,
            **self.manifest,
            "n_samples": self.n_samples,
            "tensors": [record.to_json() for record in self.records],
            "skipped": [{"name": s.name, "reason": s.reason} for s in self.skipped],
            **self._corrections(),
        }

    def _corrections(self) -> dict[str, Any]:
        named = [{"name": n, "added": v.tolist()} for n, v in self.bias_corrections.items()]
        return {"bias_corrections": named} if named else {}


def dumps(document: Mapping[str, Any], indent: int | None = None) -> str:
    """Strict JSON: no NaN or infinity can get in."""
    return json.dumps(document, indent=indent, allow_nan=False)


def decibels(signal: float, noise: float) -> float | None:
    """``10·log10(signal / noise)``; None where either is 0."""
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None
