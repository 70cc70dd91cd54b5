"""Networks of MatMul or Gemm, and rules that cut their weights into blocks."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from calib import Rules, Widths, load_model
from calib.calibration import calibrate
from calib.observations import Observations
from calib.planning import make_plan
from calib.table import CalibrationTable

DIMS = (100, 48, 70, 10)


def network(kind: str, dims: tuple[int, ...] = DIMS, dtype: type = np.float32) -> onnx.ModelProto:
    """Layers with biases: MatMul and Add, Gemm, or Gemm of transposed weights."""
    rng = np.random.default_rng(1)
    nodes, constants, value = [], {}, "x"
    for n, (inputs, outputs) in enumerate(pairwise(dims)):
        weight = rng.standard_normal((inputs, outputs)) / np.sqrt(inputs)
        constants[f"w{n}"] = (weight.T if kind == "GemmT" else weight).astype(dtype)
        constants[f"b{n}"] = rng.standard_normal(outputs).astype(dtype)
        layer, output = f"layer{n}", "y" if n == len(dims) - 2 else f"hidden{n}"
        if kind == "MatMul":
            nodes.append(helper.make_node("MatMul", [value, f"w{n}"], [f"p{n}"], name=layer))
            nodes.append(helper.make_node("Add", [f"p{n}", f"b{n}"], [output]))
        else:
            turned = int(kind == "GemmT")
            names = [value, f"w{n}", f"b{n}"]
            nodes.append(helper.make_node("Gemm", names, [output], name=layer, transB=turned))
        if output != "y":
            nodes.append(helper.make_node("Relu", [output], [f"r{n}"]))
            value = f"r{n}"
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    x, y = (
        helper.make_tensor_value_info(name, element, ["N", size])
        for name, size in (("x", dims[0]), ("y", dims[-1]))
    )
    graph = helper.make_graph(nodes, "network", [x], [y], tensors)
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def blocks(
    size: int | None, bits: int = 4, activations: int | None = None, **more: object
) -> Rules:
    return Rules(widths=Widths(bits, activations, bits), block_size=size, **more)  # type: ignore[arg-type]


def table_of(path: Path, rules: Rules) -> CalibrationTable:
    model = load_model(path)
    return calibrate(model, Observations(model.sha256, 0, {}), make_plan(model, rules), rules)
