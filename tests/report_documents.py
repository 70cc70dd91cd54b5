"""Documents as ``calib.report.page`` shows them: plausible numbers of models that do not exist."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

METHODS = ("octav", "mse", "percentile:99.9", "max", "entropy")
BITS = (4, 6, 8)
_CLIPPED_AT = {"octav": 1.0, "mse": 1.03, "percentile:99.9": 1.22, "max": 0.0, "entropy": 0.87}

Document = dict[str, Any]
Array = NDArray[np.float64]


def _file(name: str, n_bytes: int = 1_103_412) -> Document:
    return {"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), "n_bytes": n_bytes}


def _base(kind: str) -> Document:
    """What every kind has, and nothing measured."""
    return {
        "schema": 1,
        "kind": kind,
        "title": "resnet20.onnx",
        "model": _file("resnet20.onnx"),
        "command": f"octav-{kind} resnet20.onnx --data calib.npz --bits 4,6,8",
        "options": {"bits": list(BITS), "selection": {"exclude": None}, "samples": 320},
        "versions": {"python": "3.11.7", "onnxruntime": "1.31.1", "octav-calibrate": "0.1.0"},
        "samples": {"calibration": 320, "evaluation": 2000, "held_out": True},
        "float": {"top1": 87.3, "metric": None},
        "metric_name": None,
        "methods": list(METHODS),
        "bits": list(BITS),
        **{name: [] for name in ("rows", "tensors", "warnings", "notes", "skipped")},
        **dict.fromkeys(("sensitivity", "confidence", "check")),
    }


def compare_document(n_layers: int = 6) -> Document:
    """All sections that comparing methods can fill, for a model of twice as many tensors."""
    rng = np.random.default_rng(4)
    tensors = [_tensor(rng, place) for place in range(2 * n_layers)]
    names = [tensor["name"] for tensor in tensors]
    return _base("compare") | {
        "rows": [_row(method, bits) for bits in BITS for method in METHODS],
        "tensors": tensors,
        "sensitivity": _sensitivity(names),
        "confidence": _confidence(names),
        "warnings": ["Inputs are made up: numbers say nothing about accuracy."],
        "notes": ["The opset was raised from 11 to 21: 4-bit types need it."],
        "skipped": [{"name": "head/Softmax", "reason": "no quantized kernel reads it"}],
    }


def calibrate_document() -> Document:
    """One method, one width for each tensor, nothing else."""
    document = compare_document(4)
    for place, tensor in enumerate(document["tensors"]):
        bits = 8 if place < 2 else 4
        for part in ("results", "curves"):
            tensor[part] = [item for item in tensor[part] if item["bits"] == bits]
        tensor["results"] = tensor["results"][:1]
    return document | {
        "kind": "calibrate",
        "methods": ["octav"],
        "bits": [4, 8],
        "rows": document["rows"][:1],
        "sensitivity": None,
        "confidence": None,
    }


def check_document(*, passed: bool = False) -> Document:
    """The check of a model of 40 tensors, which fails at the 22nd where it fails."""
    rng = np.random.default_rng(5)
    sqnr = [34 - 0.15 * place + float(rng.normal(0, 0.8)) for place in range(40)]
    if not passed:
        sqnr[21:] = [value - 16 for value in sqnr[21:]]
    tensors: list[Document] = [
        {"name": f"layer{place}/conv", "op_type": "Conv", "sqnr_db": value}
        for place, value in enumerate(sqnr)
    ]
    found = sqnr[-1]
    words = f"the outputs' SQNR is {found:.2f} dB where at least 20 dB are asked for"
    verdict = {"bound": "min-sqnr", "limit": 20.0, "found": found, "holds": passed, "text": words}
    first = {"name": "layer21/conv", "sqnr_db": sqnr[21], "before_db": sqnr[20]}
    check = {
        "passed": passed,
        "float": _file("resnet20.onnx"),
        "quantized": _file("resnet20-w4a4.onnx", 310_220),
        "verdicts": [verdict],
        "outputs": [{"name": "logits", "sqnr_db": found, "cosine": 0.9981, "max_error": None}],
        "agreement": 0.914,
        "top1": {"float": 87.3, "quantized": 84.85},
        "metric": {"name": "metrics:recall", "float": 0.91, "quantized": 0.87},
        "tensors": tensors,
        "first": None if passed else first,
        "first_text": None if passed else "At layer21/conv the SQNR falls by 16 dB: look there.",
    }
    return _base("check") | {"methods": [], "bits": [], "check": check}


def _row(method: str, bits: int) -> Document:
    at_max = 6.02 * bits - 12
    gain = 0.0 if method == "max" else 5.5 - 0.6 * bits + METHODS.index(method) * -0.3
    return {
        "method": method,
        "bits": bits,
        "sqnr_db": at_max + gain,
        "gain_db": gain,
        "cosine": 1 - 10 ** (-(at_max + gain) / 10) / 2,
        "max_error": 30 * 10 ** (-(at_max + gain) / 20),
        "agreement": 1 - 0.3 * 0.5 ** (bits - 3),
        "top1": 87.3 - 12 * 0.4 ** (bits - 3) - METHODS.index(method) * 0.2,
        "metric": None,
        "seconds": 0.4 + 0.9 * METHODS.index(method),
        "notes": ["fewer values than levels in 3 groups"] if method == "entropy" else [],
    }


def _tensor(rng: np.random.Generator, place: int) -> Document:
    """A weight, relative to its channels' maxima, or an activation after a ReLU."""
    weight = place % 2 == 0
    layer = f"layer{place // 20 + 1}.{place // 4 % 5}"
    values = np.abs(rng.normal(size=1500)) if weight else rng.exponential(size=1500) * 1.7
    values = values / values.max() if weight else values
    counts, edges = np.histogram(values, 64, (0.0, float(values.max())))
    s = np.geomspace(values.max() / 32, values.max(), 96).tolist()
    curves = [_curve(values, bits, two=place % 7 == 3 and bits == 4) for bits in BITS]
    return {
        "name": f"{layer}.conv{place}.weight" if weight else f"/{layer}/relu{place}/Relu_output_0",
        "kind": "weight" if weight else "activation",
        "granularity": "per-channel(axis=0)" if weight else "per-tensor",
        "groups": 16 if weight else 1,
        "consumers": [f"/{layer}/conv{place + 1}/Conv"],
        "max_abs": 0.91 if weight else float(values.max()),
        "count": 2304 if weight else 5_242_880,
        "signed": weight,
        "relative": weight,
        "histogram": {"edges": edges.tolist(), "counts": (counts * 3500).tolist()},
        "results": [_result(values, curve, method, s) for curve in curves for method in METHODS],
        "s": s,
        "curves": curves,
        "notes": ["channel 3 is all zero: threshold 1"] if place == 2 else [],
    }


def _result(values: Array, curve: Document, method: str, s: list[float]) -> Document:
    largest = s[-1]
    factor = _CLIPPED_AT[method]
    threshold = min(largest, curve["minima"][0]["s"] * factor) if factor else largest
    spread = 0.15 * threshold if largest == 1 else 0.0
    mse = float(np.interp(threshold, s, curve["measured"]))
    return {
        "method": method,
        "bits": curve["bits"],
        "actual_bits": curve["bits"],
        "threshold": threshold,
        "low": threshold - spread,
        "high": min(largest, threshold + spread),
        "sqnr_db": 10 * float(np.log10(np.mean(values**2) / mse)),
    }


def _curve(values: Array, bits: int, *, two: bool) -> Document:
    """Error against the clipping scalar: measured on ``values``, and the model J(s)."""
    largest = float(values.max())
    s = np.geomspace(largest / 32, largest, 96)[:, None]
    steps = 2 ** (bits - 1) - 1
    kept = np.minimum(values, s)
    measured = np.mean((values - np.round(kept / s * steps) * s / steps) ** 2, axis=1)
    model = np.mean((values - kept) ** 2, axis=1) + s[:, 0] ** 2 / (12 * steps**2)
    if two:
        measured *= 1 + 0.5 * np.exp(-(((s[:, 0] / largest - 0.6) / 0.06) ** 2))
    at = int(np.argmin(measured))
    lowest, other = (
        {"s": float(s[i, 0]), "mse": float(measured[i])} for i in (at, min(at + 12, 95))
    )
    return {
        "bits": bits,
        "actual_bits": bits,
        "measured": measured.tolist(),
        "model": model.tolist(),
        "minima": [lowest, other] if two else [lowest],
        "second": {"small": lowest, "large": other} if two else None,
    }


def _sensitivity(names: list[str]) -> Document:
    ranked = [
        {
            "name": name,
            "kind": "activation" if "Relu" in name else "weight",
            "alone_db": 16 + 26 * (1 - 0.9**place),
            "all_but_db": 12.4 + 3.1 * 0.8**place if place < 40 else None,
            "estimated": place >= 8,
        }
        for place, name in enumerate(names)
    ]
    proposal = {
        "title": "The worst 2 tensors at 8 bits",
        "what": "Two tensors cause most of the error; at 8 bits they cost 1.3 % more memory.",
        "yaml": f"rules:\n  - {{match: '^{names[0]}$', bits: 8}}\n  - {{match: relu1, bits: 8}}\n",
        "before_db": 12.4,
        "after_db": 17.9,
        "n_samples": 256,
    }
    spared = proposal | {
        "title": "The worst tensor left float",
        "what": "Without quantizing the worst tensor at all, the output gains most.",
        "yaml": f"rules:\n  - {{match: '^{names[0]}$', skip: true}}\n",
    }
    points = range(0, len(names) + 1, max(1, len(names) // 24))
    return {
        "method": "octav",
        "bits": 4,
        "wide_bits": 8,
        "n_samples": 256,
        "base_db": 12.4,
        "wide_db": 36.1,
        "target_db": 15.4,
        "tensors": ranked,
        "layers": [f"/layer{n}/Conv" for n in range(12)],
        "curve": [{"n": n, "sqnr_db": 12.4 + 23.7 * (n / len(names)) ** 0.6} for n in points],
        "proposals": [proposal, spared],
    }


def _confidence(names: list[str]) -> Document:
    halves = [
        {
            "name": name,
            "all": 2.5,
            "first": 2.5 + 0.4 * 0.9**n,
            "second": 2.5,
            "percent": 16 * 0.9**n,
        }
        for n, name in enumerate(names)
    ]
    words = "Thresholds from two halves of the data: where they differ, more data would help."
    return {"method": "octav", "bits": 4, "n_samples": [160, 160], "tensors": halves, "text": words}
