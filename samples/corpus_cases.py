"""The models that the onnx wheel brings along, each with data to feed it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
FOLDERS = ("simple", "pytorch-converted", "pytorch-operator")
LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
N_SAMPLES = 2

Array = NDArray[Any]
Feed = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Case:
    """A model and its data, both made when they are asked for."""

    name: str
    model: Callable[[], onnx.ModelProto]
    feeds: Callable[[], Iterable[Feed]]


def all_cases() -> list[Case]:
    """The folders' cases, the node cases that hold a layer, and the light ones, by name."""
    return [*_folder_cases(), *_node_cases(), *_light_cases()]


def _folder_cases() -> Iterator[Case]:
    for folder in FOLDERS:
        for path in sorted((DATA / folder).iterdir()):
            model = partial(onnx.load, path / "model.onnx")
            yield Case(f"{folder}/{path.name}", model, partial(_saved_feeds, path))


def _saved_feeds(path: Path) -> Iterator[Feed]:
    names = _inputs(onnx.load(path / "model.onnx"))
    for folder in sorted(path.glob("test_data_set_*")):
        tensors = (onnx.load_tensor(folder / f"input_{n}.pb") for n in range(len(names)))
        yield {name: numpy_helper.to_array(t) for name, t in zip(names, tensors, strict=True)}


def _node_cases() -> Iterator[Case]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some cases overflow on purpose while they are made
        from onnx.backend.test.case.node import collect_testcases

        cases = collect_testcases(None)
    for case in cases:
        if case.model is None or LAYERS.isdisjoint(n.op_type for n in _nodes(case.model)):
            continue
        given = [inputs for inputs, _ in case.data_sets or ()]
        yield Case(
            f"node/{case.name}",
            partial(_itself, case.model),
            partial(_given_feeds, case.model, given),
        )


def _itself(model: onnx.ModelProto) -> onnx.ModelProto:
    return model


def _given_feeds(model: onnx.ModelProto, data_sets: Sequence[Sequence[Any]]) -> Iterator[Feed]:
    for inputs in data_sets:
        arrays = (
            numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value
            for value in inputs
        )
        yield dict(zip(_inputs(model), map(np.asarray, arrays), strict=True))


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """All nodes, those of subgraphs and function bodies included."""
    found = [*model.graph.node, *(node for f in model.functions for node in f.node)]
    while found:
        node = found.pop()
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                found.extend(graph.node)


def _light_cases() -> Iterator[Case]:
    """Well-known networks, of which the files hold the topology only."""
    for path in sorted((DATA / "light").glob("*.onnx")):
        yield Case(f"light/{path.stem}", partial(_with_weights, path), partial(_random, path))


def _with_weights(path: Path) -> onnx.ModelProto:
    """The model with random weights: its own are equal, or made by ConstantOfShape.

    The input of the last Softmax becomes an output too: with random weights a Softmax may
    saturate, and would then hide any error.
    """
    model = onnx.load(path)
    graph = model.graph
    known = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    shapes = {name: a.shape for name, a in known.items() if a.dtype == np.float32}
    made = [node for node in graph.node if node.op_type == "ConstantOfShape"]
    shapes |= {node.output[0]: tuple(known[node.input[0]].tolist()) for node in made}
    kept = [t for t in graph.initializer if t.name not in shapes]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        array = _sensible(shape, _role(graph, name), rng)
        graph.initializer.append(numpy_helper.from_array(array, name))
    declared = {info.name for info in graph.input}
    for name in shapes.keys() - declared:  # as IR version 3 wants it
        graph.input.append(_float_info(name, shapes[name]))
    for node in made:
        graph.node.remove(node)
    outputs = {info.name: info.type.tensor_type.shape.dim for info in graph.output}
    for node in graph.node:
        if node.op_type == "Softmax" and node.output[0] in outputs:
            shape = tuple(d.dim_value for d in outputs[node.output[0]])
            graph.output.append(_float_info(node.input[0], shape))
    return model


def _float_info(name: str, shape: tuple[int, ...]) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)


def _role(graph: onnx.GraphProto, name: str) -> tuple[str, int]:
    """Operator and input position that a weight is for, behind any Unsqueeze."""
    for node in graph.node:
        if name in node.input:
            if node.op_type == "Unsqueeze":
                return _role(graph, node.output[0])
            return node.op_type, list(node.input).index(name)
    return "", 0


def _sensible(shape: tuple[int, ...], role: tuple[str, int], rng: np.random.Generator) -> Array:
    """He-scaled matrices and kernels, factors and variances around 1, small biases and means."""
    if len(shape) > 1:
        values = rng.standard_normal(shape, np.float32)
        return values * np.float32(np.sqrt(2 / np.prod(shape[1:])))
    if role in (("BatchNormalization", 1), ("BatchNormalization", 4)) or role[0] == "Mul":
        return rng.uniform(0.8, 1.2, shape).astype(np.float32)
    return rng.standard_normal(shape, np.float32) * np.float32(0.1)


def _random(path: Path) -> Iterator[Feed]:
    graph = onnx.load(path).graph
    constants = {tensor.name for tensor in graph.initializer}
    rng = np.random.default_rng(1)
    for _ in range(N_SAMPLES):
        yield {
            info.name: rng.standard_normal(
                [d.dim_value for d in info.type.tensor_type.shape.dim], np.float32
            )
            for info in graph.input
            if info.name not in constants
        }


def _inputs(model: onnx.ModelProto) -> list[str]:
    """Names of what must be fed."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [info.name for info in model.graph.input if info.name not in constants]
