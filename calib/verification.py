"""Check that a written model computes what its calibration table says, in onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from calib.arrays import Batch
from calib.capture import Runtime, Session, version
from calib.comparison import Difference, check_nan
from calib.errors import VerificationError, one_line
from calib.graph import Model
from calib.quantize import fake_quantize, quantize
from calib.write import Quantized

# Folding reorders float32 arithmetic; agreement beyond this is rounding noise, whatever the grid.
_SAME_DB = 100.0
_UNPAIRED_DB = 60.0
_LEVEL_MARGIN_DB = 10.0

Values = Mapping[str, NDArray[Any]]


def verify(
    model: Model,
    quantized: Quantized,
    path: Path,
    batch: Batch,
    runtime: Runtime | None = None,
) -> None:
    """Raises `VerificationError` unless the file at ``path`` holds what ``quantized`` is, and

    - passes ``onnx.checker``, full check;
    - computes what the original does, were its QDQ pairs left out;
    - stores exactly the integers that `calib.quantize` makes of the weights;
    - runs in onnxruntime with graph optimisation off and at the default level, its outputs free
      of NaN and every QDQ pair equal to `calib.quantize`, bit for bit, on ``batch``;
    - gives outputs at the two levels that differ by 10 dB less than quantization itself does.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise VerificationError(f"onnx.checker rejects the model: {one_line(error)}") from error
    _check_weights(model, quantized, ir.load(path))
    expected = Session(model.path, runtime).run(batch.feed)
    unpaired = _without_pairs(model, quantized, ir.load(path))
    _check_unpaired(expected, Session(unpaired, runtime).run(batch.feed))
    pairs = []
    for optimized in (False, True):
        names = [*_activations(quantized), *quantized.dequantized.values()]
        session = Session(path, runtime, optimized=optimized, values=names)
        pairs.append(_check_pairs(model, quantized, session.run(batch.feed), optimized))
    plain, optimal = (
        Session(path, runtime, optimized=level).run(batch.feed) for level in (False, True)
    )
    hint = _first_difference(*pairs) + _known_cause(quantized)
    _check_levels(expected, plain, optimal, hint)


def _activations(quantized: Quantized) -> list[str]:
    return [r.name for r in quantized.table.records if r.spec.kind == "activation"]


def _check_weights(model: Model, quantized: Quantized, written: ir.Model) -> None:
    for record in quantized.table.records:
        if record.spec.kind == "weight":
            tensor = written.graph.initializers[quantized.stored[record.name]].const_value
            assert tensor is not None
            wanted = quantize(
                model.weight(record.name), record.scale, record.qtype, record.spec.granularity
            )
            if not np.array_equal(tensor.numpy().astype(np.int32), wanted):
                raise VerificationError(f"weight {record.name!r}: the written integers are wrong")


def _check_pairs(model: Model, quantized: Quantized, values: Values, optimized: bool) -> Values:
    """Returns the dequantized activations, in graph order."""
    for record in quantized.table.records:
        is_weight = record.spec.kind == "weight"
        source = model.weight(record.name) if is_weight else values[record.name]
        actual = values[quantized.dequantized[record.name]]
        wanted = fake_quantize(source, record.scale, record.qtype, record.spec.granularity)
        if not np.array_equal(actual, wanted):
            raise VerificationError(
                f"{record.spec.kind} {record.name!r}: its QDQ pair differs from the NumPy oracle "
                f"in {int((actual != wanted).sum())} of {actual.size} values, graph optimisation "
                f"{'at the default level' if optimized else 'off'}"
            )
    return {name: values[quantized.dequantized[name]] for name in _activations(quantized)}


def _without_pairs(model: Model, quantized: Quantized, written: ir.Model) -> ir.Model:
    """``written``, changed so that every consumer reads the float tensor again."""
    values = {v.name: v for node in written.graph for v in node.outputs}
    values.update({v.name: v for v in written.graph.inputs})
    for record in quantized.table.records:
        if record.spec.kind == "weight":
            tensor = ir.tensor(model.weight(record.name))
            source = ir.Value(name=f"{record.name}/float", const_value=tensor)
            written.graph.register_initializer(source)
        else:
            source = values[record.name]
        pair = values[quantized.dequantized[record.name]]
        pair.replace_all_uses_with(source)
    return written


def _check_unpaired(expected: Values, unpaired: Values) -> None:
    for name, reference in expected.items():
        if reference.dtype.kind == "f":
            check_nan(name, reference, reference)
        if (found := _sqnr_db(expected, unpaired, name)) < _UNPAIRED_DB:
            raise VerificationError(
                f"apart from its QDQ pairs the written model does not compute what the original "
                f"does: SQNR {found:.1f} dB in output {name!r}, at least {_UNPAIRED_DB:.0f} "
                f"needed; please report the model"
            )


def _check_levels(expected: Values, plain: Values, optimized: Values, hint: str) -> None:
    for name, values in plain.items():
        if values.dtype.kind != "f":
            continue
        for level in (values, optimized[name]):
            check_nan(name, expected[name], level)
        needed = min(_sqnr_db(expected, plain, name) + _LEVEL_MARGIN_DB, _SAME_DB)
        if (found := _sqnr_db(plain, optimized, name)) < needed:
            raise VerificationError(
                f"onnxruntime's default level changes output {name!r}: SQNR {found:.1f} dB "
                f"against optimisation off, at least {needed:.1f} needed; {hint}"
            )


def _first_difference(plain: Values, optimized: Values) -> str:
    for name, values in plain.items():
        if not np.array_equal(values, optimized[name]):
            return f"the first tensor that differs is {name!r}"
    return "no quantized tensor differs, only what is computed from them"


def _known_cause(quantized: Quantized) -> str:
    """What is known to make the levels differ.

    onnxruntime 1.20 to 1.30 computed UltraFace wrongly at every level with 4-bit activations and
    8-bit edges, rightly with 4-bit edges or 8-bit activations; 1.31 does. Its default level
    computes a MatMul of which the weight alone is quantized in int8 (MatMulNBits).
    """
    activations = [r for r in quantized.table.records if r.spec.kind == "activation"]
    if version() < (1, 31) and any(record.qtype.bits == 4 for record in activations):
        return (
            ". onnxruntime before 1.31 can mix up 4-bit and 8-bit activations: upgrade it, or use "
            "other activation-bits"
        )
    both = {name for record in activations for name in record.spec.consumers}
    weights = (r for r in quantized.table.records if r.spec.kind == "weight")
    alone = sorted({name for r in weights for name in r.spec.consumers if name not in both})
    if alone:
        return (
            f". Of {alone[0]!r} only the weight is quantized, which onnxruntime may compute in "
            f"int8: quantize both its inputs, or neither"
        )
    return ""


def _sqnr_db(reference: Values, other: Values, name: str) -> float:
    if reference[name].dtype.kind != "f":
        return _SAME_DB if np.array_equal(reference[name], other[name]) else 0.0
    difference = Difference()
    difference.add(reference[name], other[name])
    return difference.sqnr_db
