"""Bias correction: the mean error that quantization leaves in each output channel, taken out.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019,
section 4.2, with the means measured on calibration samples (their appendix D).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calib.arrays import Batch
from calib.biases import Layer, correctable, has_room
from calib.capture import Runtime, Session
from calib.distribution import Floats
from calib.editing import Editor
from calib.errors import ModelError, OptionError
from calib.graph import Model
from calib.iterables import Batches
from calib.run import Split
from calib.table import CalibrationTable
from calib.targets import TARGETS
from calib.write import write_qdq

PASSES = 2

_AXES_ARE_AN_INPUT = 18


def correct_biases(
    model: Model,
    table: CalibrationTable,
    batches: Callable[[], Iterable[Batch]],
    runtime: Runtime | None = None,
    passes: int = PASSES,
) -> CalibrationTable:
    """``table`` with what must be added to the bias of each layer, so that the mean of every output
    channel over ``batches`` is that of the float model.

    Each batch goes through the float model, then through the quantized one, in which every layer is
    corrected, on its way through the graph, by the mean of its error over all batches so far, this
    one included. So a layer sees the layers before it corrected, and no batch need be kept. Only
    vectors ``(C,)`` leave onnxruntime.

    Where a layer goes into a sum, as at the end of a residual block, the error of the sum is what
    is corrected: noise before a Relu raises the mean behind it, which the other branch carries on,
    and which the negative error of clipped weights makes up for. To correct that alone makes a
    3-bit ResNet-20 worse (44 instead of 58 %), to correct the sum makes it better (75 %).

    Args:
        model: the float model.
        table: thresholds; corrections that it holds are replaced.
        batches: gives the calibration samples, once for each pass; padding in them counts.
        runtime: how to execute.
        passes: over the samples; the second sees good corrections from its first batch on.

    Raises:
        ModelError: if onnxruntime fails, or a mean is not finite.
    """
    table = table.with_corrections({})
    layers = _layers(model, table)
    if not layers:
        return table
    means = _Means(model, layers, runtime)
    corrected = _Corrected(model, table, layers, runtime)
    for _ in range(passes):
        for number, batch in enumerate(batches()):
            started = batch if number else replace(batch, restart=True)
            corrected.add(started, *means.of(started))
    return table.with_corrections(corrected.corrections)


def check_correctable(split: Split, *, made_up: bool) -> None:
    """Raises `OptionError` unless biases can be corrected on the samples of ``split``; ``made_up``:
    they are, though what is quantized does not come from them."""
    if isinstance(split.source, Batches) and split.source.once_only:
        raise OptionError(
            "bias-correction needs data that can be gone through again: give a function that "
            "returns a new iterator at each call, or a list"
        )
    if split.run.padding_mask is not None:
        raise OptionError(
            "bias-correction counts padding, padding-mask says not to: leave out one of them"
        )
    if made_up:
        raise OptionError(
            "bias-correction needs the samples themselves, beside observations or for weights "
            "alone, too: give --data"
        )


def corrected_on(model: Model, table: CalibrationTable, split: Split) -> CalibrationTable:
    """As `correct_biases`, on the calibration samples of ``split``."""
    return correct_biases(model, table, partial(split.again, "correct"), split.run.runtime)


def _layers(model: Model, table: CalibrationTable) -> tuple[Layer, ...]:
    """Those that read quantized tensors."""
    names = {name for record in table.records for name in record.spec.consumers}
    layers = correctable(model.ir.graph, names)
    if TARGETS[table.target].bias == "add":
        return layers
    nodes = {node.name: node for node in model.ir.graph}
    return tuple(layer for layer in layers if has_room(nodes[layer.node]))


class _Means:
    """Channel means of the float model's layers."""

    def __init__(self, model: Model, layers: Sequence[Layer], runtime: Runtime | None):
        graph = model.ir.clone()
        editor = Editor(graph)
        self._names = {
            layer.node: (
                str(_channel_mean(editor, layer).name),
                str(editor.node("Size", [editor.values[layer.measured]], "size").name),
            )
            for layer in layers
        }
        self._layers = layers
        names = [name for pair in self._names.values() for name in pair]
        self._session = Session(graph, runtime, values=names, feedback=model.feedback)

    def of(self, batch: Batch) -> tuple[dict[str, Floats], dict[str, int]]:
        """By node: the means ``(C,)``, and of how many values each is one."""
        values = self._session.run(batch.feed, batch.restart)
        means, counts = {}, {}
        for layer in self._layers:
            mean, size = (values[name] for name in self._names[layer.node])
            means[layer.node] = mean.astype(np.float64)
            counts[layer.node] = int(size) // layer.channels
        return means, counts


@dataclass(slots=True)
class _Running:
    """The mean error of a layer over what was seen."""

    error: Floats
    count: int = 0

    def ahead(self, mean: Floats, count: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The correction is ``constant - share · m`` where m is the mean of the values to come, of
        which there are ``count``, and ``mean`` their float mean."""
        share = count / max(self.count + count, 1)
        constant = (1 - share) * self.error + share * mean
        return constant.astype(np.float32), np.array(share, np.float32)

    def add(self, error: Floats, count: int) -> None:
        share = count / max(self.count + count, 1)
        self.error = (1 - share) * self.error + share * error
        self.count += count


class _Corrected:
    """The quantized model, in which layers are corrected while it runs."""

    def __init__(
        self,
        model: Model,
        table: CalibrationTable,
        layers: Sequence[Layer],
        runtime: Runtime | None,
    ):
        graph = write_qdq(model, table).ir
        editor = Editor(graph)
        self._names = {layer.node: _correct_on_the_way(editor, layer) for layer in layers}
        graph.graph.sort()
        self._running = {layer.node: _Running(np.zeros(layer.channels)) for layer in layers}
        names = [mean for mean, _, _ in self._names.values()]
        self._session = Session(graph, runtime, values=names, feedback=model.feedback)

    @property
    def corrections(self) -> dict[str, Floats]:
        return {name: running.error for name, running in self._running.items()}

    def add(self, batch: Batch, means: Mapping[str, Floats], counts: Mapping[str, int]) -> None:
        feed = dict(batch.feed)
        for node, (_, constant, share) in self._names.items():
            feed[constant], feed[share] = self._running[node].ahead(means[node], counts[node])
        values = self._session.run(feed, batch.restart)
        for node, (mean, _, _) in self._names.items():
            if not counts[node]:
                continue
            error = means[node] - values[mean].astype(np.float64)
            if not np.isfinite(error).all():
                raise ModelError(
                    f"bias correction: the mean output of {node!r} is not finite in the float or "
                    f"in the quantized model"
                )
            self._running[node].add(error, counts[node])


def _correct_on_the_way(editor: Editor, layer: Layer) -> tuple[str, str, str]:
    """Puts a correction behind a layer that every other reader of its output sees; the names of
    the mean without it, and of the inputs for `_Running.ahead`."""
    value = editor.values[layer.measured]
    readers = [(use.node, use.idx) for use in value.uses()]
    mean = _channel_mean(editor, layer)
    constant = editor.input(f"{layer.node}_constant", [layer.channels])
    share = editor.input(f"{layer.node}_share", [])
    correction = editor.node("Sub", [constant, editor.node("Mul", [mean, share], "part")], "by")
    shape = editor.constant("channels", np.array(layer.shape, np.int64))
    correction = editor.node("Reshape", [correction, shape], "by_channel")
    if value.dtype is ir.DataType.FLOAT16:
        correction = editor.node("Cast", [correction], "by_half", attributes=_to(value.dtype))
    corrected = editor.node("Add", [value, correction], "corrected", value)
    for node, position in readers:
        node.replace_input_with(position, corrected)
    if value.is_graph_output():  # it may be fed back
        outputs = editor.graph.outputs
        outputs[outputs.index(value)] = corrected
        name, value.name = value.name, editor.new_name("uncorrected")
        corrected.name = name
    return str(mean.name), str(constant.name), str(share.name)


def _channel_mean(editor: Editor, layer: Layer) -> ir.Value:
    """A new value ``(C,)``, float32: the mean of the layer's output over all but its channels."""
    value = editor.values[layer.measured]
    exact = editor.node("Cast", [value], "exact", attributes=_to(ir.DataType.FLOAT))
    if layer.rank is None:
        shape = editor.constant("rows", np.array([-1, layer.channels], np.int64))
        exact, axes = editor.node("Reshape", [exact, shape], "in_rows"), [0]
    else:
        axes = [axis for axis in range(layer.rank) if axis != 1]
    inputs, attributes = [exact], [ir.AttrInt64("keepdims", 0)]
    if editor.opset >= _AXES_ARE_AN_INPUT:
        inputs.append(editor.constant("axes", np.array(axes, np.int64)))
    else:
        attributes.append(ir.AttrInt64s("axes", axes))
    return editor.node("ReduceMean", inputs, "mean", attributes=attributes)


def _to(dtype: ir.DataType) -> list[ir.Attr]:
    return [ir.AttrInt64("to", int(dtype))]
