"""Check a model whose blocks of weights are onnxruntime's own operator, against its QDQ form."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from calib.capture import Values
from calib.checker import check_file
from calib.comparison import check_nan
from calib.errors import VerificationError, one_line
from calib.matmulnbits import DOMAIN, OPERATOR, inputs_first, read_packed, unpack
from calib.quantize import fake_quantize
from calib.saving import Quantized
from calib.verification import Check, check_levels, sqnr_db
from calib.verification import verify as verify_qdq

_ROUNDING_LEVEL = 4
_LEVELS = {False: "with optimisation off", True: "at the default level"}


def verify(check: Check, source: Quantized) -> tuple[str, ...]:
    """As `calib.verification.verify`, or `verify_packed` where the file has the operator in the
    place of DequantizeLinear in ``source``."""
    if check.quantized.stored != source.stored:
        return verify_packed(check, source)
    return verify_qdq(check.model, check.quantized, check.path, check.batch, check.runtime)


def verify_packed(check: Check, twin: Quantized) -> tuple[str, ...]:
    """Notes on a good file; raises `VerificationError` unless

    - ``twin``, the same model with DequantizeLinear before its weights, passes
      `calib.verification.verify`;
    - the operators of the file multiply with what `calib.quantize` makes of the weights, bit for
      bit;
    - its outputs are those of ``twin`` with optimisation off, as that asks of the two levels.
      Where the operators round their input to int8, how far they lie from them is a note.
    """
    try:
        check_file(check.path, full_check=True)
    except Exception as error:
        raise VerificationError(f"onnx.checker rejects the model: {one_line(error)}") from error
    nodes = [node for node in ir.load(check.path).graph if node.domain == DOMAIN]
    nodes = [node for node in nodes if node.op_type == OPERATOR]
    _check_weights(check, nodes)
    with tempfile.TemporaryDirectory(prefix="octav-calibrate-") as folder:
        path = Path(folder, "model.onnx")
        saved = twin.write(path)
        verify_qdq(check.model, saved, path, check.batch, check.runtime)
        plain = replace(check, quantized=saved).run(path, optimized=False)
    expected = check.run(check.model.path)
    found = {optimized: check.run(check.path, optimized) for optimized in (False, True)}
    rounded = any(n.attributes.get_int("accuracy_level", 0) == _ROUNDING_LEVEL for n in nodes)
    if rounded:
        return _rounded(expected, plain, found[True], len(nodes))
    for optimized, values in found.items():
        hint = f"{OPERATOR} {_LEVELS[optimized]} computes otherwise than DequantizeLinear does"
        check_levels(check, expected, (plain, values), hint)
    return ()


def _check_weights(check: Check, nodes: list[ir.Node]) -> None:
    by_blob = {check.quantized.stored[record.name]: record for record in check.weights}
    for node in nodes:
        assert node.inputs[1] is not None
        record = by_blob[str(node.inputs[1].name)]
        weight = check.model.weight(record.name)
        wanted = fake_quantize(weight, record.scale, record.qtype, record.spec.granularity)
        if not np.array_equal(unpack(read_packed(node)), inputs_first(wanted, record)):
            raise VerificationError(f"weight {record.name!r}: the packed integers are wrong")


def _rounded(expected: Values, plain: Values, found: Values, n: int) -> tuple[str, ...]:
    floats = [name for name, values in plain.items() if values.dtype.kind == "f"]
    for name in floats:
        check_nan(name, expected[name], found[name])
    if not floats:
        return ()
    name = min(floats, key=lambda name: sqnr_db(plain, found, name))
    note = (
        f"{n} layers round their input to int8, as weight-format matmulnbits-int8 says: output "
        f"{name!r} lies {sqnr_db(expected, found, name):.1f} dB from the float model, computed in "
        f"float32 {sqnr_db(expected, plain, name):.1f} dB"
    )
    return (note,)
