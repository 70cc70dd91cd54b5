"""Check that a written model computes what its calibration table says, in onnxruntime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calib.arrays import Batch
from calib.capture import EXACT, Runtime, Session, Values, version
from calib.checker import check_file
from calib.comparison import Difference, check_nan
from calib.errors import ModelError, VerificationError, one_line
from calib.granularity import Blocked, pieces
from calib.graph import Model
from calib.prepare import remove_unused
from calib.quantize import fake_quantize, quantize
from calib.saving import Quantized
from calib.table import TensorRecord
from calib.unpaired import check_biases, without_pairs

# Folding reorders float32 arithmetic; agreement beyond this is rounding noise, whatever the grid.
_SAME_DB = 100.0
_UNPAIRED_DB = 60.0
# onnxruntime's float16 differs from the reference by up to 5e-3 (method.md, section 4): 46 dB.
_FLOAT16_DB = 40.0
_ALIKE_SHARE = 0.99
_LEVEL_MARGIN_DB = 10.0
# Kernels in integers round what floats do not: their error is another sample of the same noise. So
# is, of the samples on which biases were corrected, what the other level leaves.
_INTEGER_MARGIN_DB = -6.0
# In a deep model, one level that flips in the first layer makes another sample of the same noise of
# the last (48 layers: 25 dB apart, each 22 dB from float): as good, though not alike.
_LEVEL_LOSS_DB = 1.0
_MOST_WEIGHT_VALUES = 1 << 24  # dequantized weights held at a time


@dataclass(frozen=True, slots=True)
class Check:
    """The pieces that every check needs."""

    model: Model
    quantized: Quantized
    path: Path
    batch: Batch
    runtime: Runtime | None

    def run(
        self, model: Path | ir.Model, optimized: bool = True, values: Sequence[str] | None = None
    ) -> Values:
        """The outputs of ``model`` on the batch, or ``values`` in it."""
        session = Session(
            model,
            self.runtime,
            optimized=optimized,
            values=values,
            feedback=self.model.feedback,
        )
        return session.run(self.batch.feed, restart=True)

    @property
    def activations(self) -> list[TensorRecord]:
        """Of the table."""
        return [r for r in self.quantized.table.records if r.spec.kind == "activation"]

    @property
    def weights(self) -> list[TensorRecord]:
        """Of the table."""
        return [r for r in self.quantized.table.records if r.spec.kind == "weight"]

    @property
    def float16(self) -> bool:
        """Whether the model computes in float16 anywhere."""
        graph = self.model.ir.graph
        values = [*graph.inputs, *graph.initializers.values()]
        values.extend(v for node in graph for v in node.outputs)
        return any(v.dtype is ir.DataType.FLOAT16 for v in values)


def verify(
    model: Model,
    quantized: Quantized,
    path: Path,
    batch: Batch,
    runtime: Runtime | None = None,
) -> tuple[str, ...]:
    """Notes on a good file; raises `VerificationError` unless the one at ``path`` holds what
    ``quantized`` is, and

    - passes ``onnx.checker``, full check;
    - computes what the original does, were its QDQ pairs and the corrections of biases that the
      table states left out (to 60 dB; 40 dB where float16 is computed with);
    - stores exactly the integers that `calib.quantize` makes of the weights;
    - runs in onnxruntime with graph optimisation off and at the default level, its outputs free
      of NaN and every QDQ pair equal to `calib.quantize`, bit for bit, on ``batch``;
    - gives outputs at the two levels that differ by 10 dB less than quantization itself does, or at
      the default level outputs that are no more than 1 dB further from the original's; by no more
      than quantization does where biases are corrected, by 6 dB more in integer kernels. Layers of
      which the weight alone is quantized are computed in float32 for that; what the default level
      makes of them otherwise is a note.
    """
    try:
        check_file(path, full_check=True)
    except Exception as error:
        raise VerificationError(f"onnx.checker rejects the model: {one_line(error)}") from error
    check = Check(model, quantized, path, batch, runtime)
    _check_weights(check, ir.load(path))
    check_biases(model, quantized, ir.load(path))
    expected = check.run(model.path)
    _check_unpaired(check, expected)
    with _blocks_named(quantized):
        pairs = [_check_pairs(check, optimized) for optimized in (False, True)]
        plain, optimal = (check.run(path, optimized) for optimized in (False, True))
    hint = _first_difference(*pairs) + _known_cause(quantized)
    notes = _rounded(check, expected, (plain, optimal))
    if notes:
        optimal = replace(check, runtime=replace(runtime or Runtime(), exact=True)).run(path)
    check_levels(check, expected, (plain, optimal), hint)
    return notes


@contextmanager
def _blocks_named(quantized: Quantized) -> Iterator[None]:
    """What onnxruntime 1.31 refuses of weights in blocks is said in our words: it makes integer
    operators of them that know a scale a channel."""
    try:
        yield
    except ModelError as error:
        specs = [record.spec for record in quantized.table.records]
        both = any(spec.kind == "activation" for spec in specs)
        if not both or not any(isinstance(spec.granularity, Blocked) for spec in specs):
            raise
        raise VerificationError(
            "onnxruntime cannot run weights in blocks beside these quantized activations: make "
            f"activation-bits none or 16, or leave block-size out ({error})"
        ) from error


def _check_weights(check: Check, written: ir.Model) -> None:
    """The integers are those of the oracle, and so is what each level makes of them."""
    portion: list[TensorRecord] = []
    for record in check.weights:
        tensor = written.graph.initializers[check.quantized.stored[record.name]].const_value
        assert tensor is not None
        weight, integers = check.model.weight(record.name), tensor.numpy()
        for index, groups in pieces(weight.shape, record.spec.granularity):
            wanted = quantize(
                weight[index], record.scale[groups], record.qtype, record.spec.granularity
            )
            wanted += record.qtype.zero_point
            if not np.array_equal(integers[index].astype(np.int32), wanted):
                raise VerificationError(f"weight {record.name!r}: the written integers are wrong")
        if isinstance(tensor, ir.ExternalTensor):
            del integers
            tensor.release()
        portion.append(record)
        if sum(r.count for r in portion) > _MOST_WEIGHT_VALUES:
            _check_dequantized(check, written, portion)
            portion = []
    _check_dequantized(check, written, portion)


def _check_dequantized(check: Check, written: ir.Model, records: list[TensorRecord]) -> None:
    if not records:
        return
    part = written.clone()
    by_name = {v.name: v for node in part.graph for v in node.outputs}
    names = [check.quantized.dequantized[record.name] for record in records]
    part.graph.inputs.clear()
    part.graph.outputs.clear()
    part.graph.outputs.extend(by_name[name] for name in names)
    remove_unused(part)
    for optimized in (False, True):
        values = Session(part, check.runtime, optimized=optimized).run({})
        for record, name in zip(records, names, strict=True):
            _check_pair(record, check.model.weight(record.name), values[name], optimized)


def _check_pairs(check: Check, optimized: bool) -> Values:
    """Returns the dequantized activations, in graph order."""
    pairs = {r.name: check.quantized.dequantized[r.name] for r in check.activations}
    sources = {name: check.quantized.sources.get(name, name) for name in pairs}
    read = dict.fromkeys((*sources.values(), *pairs.values()))
    values = check.run(check.path, optimized, [*read]) if pairs else {}
    for record in check.activations:
        if (source := sources[record.name]) in values:  # an optional value may not be there
            _check_pair(record, values[source], values[pairs[record.name]], optimized)
    return {name: values[pair] for name, pair in pairs.items() if pair in values}


def _check_pair(
    record: TensorRecord, source: NDArray[Any], actual: NDArray[Any], optimized: bool
) -> None:
    granularity = record.spec.granularity
    for index, groups in pieces(source.shape, granularity):
        scale = record.scale[groups]
        wanted = fake_quantize(source[index], scale, record.qtype, granularity)
        if not np.array_equal(actual[index], wanted):
            raise VerificationError(
                f"{record.spec.kind} {record.name!r}: its QDQ pair differs from the NumPy oracle "
                f"in {int((actual[index] != wanted).sum())} of {wanted.size} values, graph "
                f"optimisation {'at the default level' if optimized else 'off'}"
            )


def _check_unpaired(check: Check, expected: Values) -> None:
    unpaired = check.run(without_pairs(check.model, check.quantized, check.path))
    needed = _FLOAT16_DB if check.float16 else _UNPAIRED_DB
    for name, reference in expected.items():
        if reference.dtype.kind == "f":
            check_nan(name, reference, unpaired[name])
        if (found := sqnr_db(expected, unpaired, name)) < needed:
            raise VerificationError(
                f"apart from {_left_out(check.quantized)} the written model does not compute what "
                f"the original does: SQNR {found:.1f} dB in output {name!r}, at least {needed:.0f} "
                f"needed{_raised(check.quantized)}; please report the model"
            )


def _left_out(quantized: Quantized) -> str:
    return "its QDQ pairs" + (" and bias corrections" if quantized.corrected else "")


def _raised(quantized: Quantized) -> str:
    raised = next((note for note in quantized.notes if note.startswith("opset raised")), None)
    return f" ({raised}: export the model with that opset)" if raised else ""


def _margin_db(quantized: Quantized) -> float:
    """By how much the two levels must be closer to each other than the model to the original."""
    if quantized.table.target == "onnxruntime":
        return _INTEGER_MARGIN_DB
    return 0.0 if quantized.table.bias_corrections else _LEVEL_MARGIN_DB


def check_levels(check: Check, expected: Values, levels: tuple[Values, Values], hint: str) -> None:
    """Raises `VerificationError` if the outputs of the second of ``levels`` are further from those
    of the first than these, which ``expected`` are the float model's of, allow."""
    plain, optimized = levels
    same = _FLOAT16_DB if check.float16 else _SAME_DB
    for name, values in plain.items():
        if values.dtype.kind != "f":
            continue
        for level in (values, optimized[name]):
            check_nan(name, expected[name], level)
        quantization = sqnr_db(expected, plain, name)
        needed = min(quantization + _margin_db(check.quantized), same)
        if (found := sqnr_db(plain, optimized, name)) < needed:
            if sqnr_db(expected, optimized, name) >= quantization - _LEVEL_LOSS_DB:
                continue
            raise VerificationError(
                f"onnxruntime's default level changes output {name!r}: SQNR {found:.1f} dB "
                f"against optimisation off, at least {needed:.1f} needed; {hint}"
            )


def _rounded(check: Check, expected: Values, levels: tuple[Values, Values]) -> tuple[str, ...]:
    """A note where the default level may round to int8 what the file leaves float, and does."""
    plain, optimized = levels
    alone = _alone(check.quantized)
    floats = [name for name, values in plain.items() if values.dtype.kind == "f"]
    for name in floats:
        check_nan(name, expected[name], optimized[name])
    apart = {name: sqnr_db(plain, optimized, name) for name in floats}
    if not alone or min(apart.values(), default=_SAME_DB) >= _SAME_DB:
        return ()
    name = min(apart, key=lambda name: apart[name])
    exact, found = (sqnr_db(expected, level, name) for level in levels)
    note = (
        f"{len(alone)} layers, the first {alone[0]!r}, have a quantized weight and a float input, "
        f"which onnxruntime's default level rounds to int8: output {name!r} lies {found:.1f} dB "
        f"from the float model, computed in float32 {exact:.1f} dB; session option {EXACT} = 0 "
        f"keeps float32"
    )
    return (note,)


def _alone(quantized: Quantized) -> list[str]:
    """MatMul and Gemm of which the weight alone is quantized."""
    records = quantized.table.records
    both = {n for r in records if r.spec.kind == "activation" for n in r.spec.consumers}
    weights = {n for r in records if r.spec.kind == "weight" for n in r.spec.consumers}
    layers = (node.name for node in quantized.ir.graph if node.op_type in ("MatMul", "Gemm"))
    return [str(name) for name in layers if name in weights and name not in both]


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
    if alone := _alone(quantized):
        return (
            f". Of {alone[0]!r} only the weight is quantized, which onnxruntime may compute in "
            f"int8: quantize both its inputs, or neither"
        )
    return ""


def sqnr_db(reference: Values, other: Values, name: str) -> float:
    """Of the output ``name``, where that is an array of floats."""
    if reference[name].dtype.kind != "f":  # an argmax may break ties otherwise
        share = np.count_nonzero(reference[name] == other[name]) / max(reference[name].size, 1)
        return _SAME_DB if share >= _ALIKE_SHARE or not reference[name].size else 0.0
    difference = Difference()
    difference.add(reference[name], other[name])
    return difference.sqnr_db
