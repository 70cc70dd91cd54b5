"""Which operators of a written model onnxruntime's CPU runs in integers, and which not and why."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort  # type: ignore[import-untyped, unused-ignore]

from calib.capture import Runtime
from calib.graph import Skipped
from calib.placement import Target
from calib.prepare import QUANTIZABLE_OPS
from calib.saving import Quantized

_SEVERITY_FATAL = 4
_INTEGER = (
    "QGemm",
    "MatMulIntegerToFloat",
    "ConvInteger",
    "MatMulInteger",
    "QAttention",
    "MatMulNBits",
)
_NUMBERED = re.compile(r"_token_\d+$|_nchwc$")
_VNNI = {"avx512_vnni", "avx_vnni", "amx_int8"}


@dataclass(frozen=True, slots=True)
class Kernels:
    """Attributes:
    integer: how many operators run in integers, by the kernel's name.
    floating: those that could and do not, and why.
    """

    integer: dict[str, int]
    floating: tuple[Skipped, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        floating = [{"name": s.name, "reason": s.reason} for s in self.floating]
        return {"integer": self.integer, "float": floating}

    def __str__(self) -> str:
        n = sum(self.integer.values())
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.integer.items()))
        return f"{n} of {n + len(self.floating)}" + (f" ({kinds})" if kinds else "")


def integer_kernels(
    quantized: Quantized, path: Path, target: Target, runtime: Runtime | None = None
) -> Kernels:
    """What onnxruntime's optimiser makes of the model at ``path``, at its default level.

    Args:
        quantized: the same model, and what was left float in it.
        path: its file.
        target: which operators could run in integers.
        runtime: for libraries of custom operators.
    """
    optimized = {_plain_name(node): node.op_type for node in _optimized(path, runtime or Runtime())}
    could = (*QUANTIZABLE_OPS, *target.joined)
    found, floating = Counter[str](), []
    for node in quantized.ir.graph:
        if node.op_type not in could or node.domain != "":
            continue
        if node.outputs[0].dtype not in (None, ir.DataType.FLOAT, ir.DataType.FLOAT16):
            continue
        kernel = optimized.get(str(node.name), "")
        if kernel.startswith("QLinear") or kernel in _INTEGER:
            found[kernel] += 1
        else:
            floating.append(Skipped(str(node.name), _reason(node, quantized, target)))
    return Kernels(dict(found), tuple(floating))


def has_vnni(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool | None:
    """Whether an x86 CPU adds up U8S8 products in 32 bits; None for another CPU, or unknown.

    Others add pairs of products in 16 bits, which saturate.
    """
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    flags = next((line for line in text.splitlines() if line.startswith("flags")), None)
    return None if flags is None else not _VNNI.isdisjoint(flags.split())


def _optimized(path: Path, runtime: Runtime) -> list[ir.Node]:
    with tempfile.TemporaryDirectory(prefix="octav-calibrate-") as folder:
        options = ort.SessionOptions()
        options.log_severity_level = _SEVERITY_FATAL
        options.optimized_model_filepath = str(Path(folder, "optimized.onnx"))
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", "weights.data"
        )
        for library in runtime.custom_ops:
            options.register_custom_ops_library(str(library.absolute()))
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return list(ir.load(options.optimized_model_filepath).graph)


def _plain_name(node: ir.Node) -> str:
    return _NUMBERED.sub("", str(node.name))


def _reason(node: ir.Node, quantized: Quantized, target: Target) -> str:
    name = str(node.name)
    for skipped in quantized.table.skipped:
        if skipped.name.endswith(f" of {name}") or skipped.name.partition("[")[0] == name:
            return skipped.reason
    if node.op_type in target.no_kernel:
        return f"{target.runtime} has no integer kernel for {node.op_type}"
    inputs = [v.producer() for v in node.inputs[:2] if v is not None]
    if not any(p is not None and p.op_type == "DequantizeLinear" for p in inputs):
        return "its inputs are not quantized: no layer in integers makes them"
    return "onnxruntime makes no integer kernel of it"
