"""Run a model in onnxruntime and read any of its values. The only door to onnxruntime."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort  # type: ignore[import-untyped, unused-ignore]
from numpy.typing import NDArray

from calib.channels import CHANNELS_FIRST, in_blocks, put_channels_last
from calib.errors import CalibError, ModelError, OptionError, one_line
from calib.parts import copy_for, part_for, shareable, take_out

Values = dict[str, NDArray[Any]]
Source = Path | ir.Model

_SEVERITY_FATAL = 4
_MOST_THREADS = 1024
_LOADED_BY_ALL = 22  # `newest_opset` of onnxruntime 1.23, the oldest that is supported
_FIRST_UNKNOWN_OPSET = 40
_UNKNOWN_OP = "is not a registered function/op"
_MOST_INLINE_BYTES = 1_500_000_000  # protobuf ends at 2 GB
EXACT = "session.qdq_matmulnbits_accuracy_level"
_NO_SPINNING_BETWEEN_RUNS = "session.force_spinning_stop"
_FOLDER_OF_EXTERNAL_DATA = "session.model_external_initializers_file_folder_path"
_NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(bool)": np.bool_,
    **{f"tensor({t})": t for t in ("int8", "int16", "int32", "int64")},
    **{f"tensor(u{t})": f"u{t}" for t in ("int8", "int16", "int32", "int64")},
}


@dataclass(frozen=True, slots=True)
class Runtime:
    """How onnxruntime executes.

    Args:
        provider: execution provider; None for the CPU.
        threads: intra-op threads; 0 leaves it to onnxruntime.
        custom_ops: shared libraries that implement custom operators.
        frugal: take as little memory as can be and keep none between runs; slower.
        yielding: threads of onnxruntime sleep between runs, when there is other work.
        scattered: inner values may lie in memory in any order of axes, whichever is soonest there.
        exact: where only the weight is quantized, do not round the other input to int8.

    Raises:
        OptionError: if threads are negative or absurdly many.
    """

    provider: str | None = None
    threads: int = 0
    custom_ops: tuple[Path, ...] = ()
    frugal: bool = False
    yielding: bool = False
    scattered: bool = False
    exact: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.threads <= _MOST_THREADS:
            raise OptionError(f"threads must be 0 to {_MOST_THREADS}, got {self.threads}")

    @property
    def cores(self) -> int:
        """How many threads there may be."""
        if self.threads:
            return self.threads
        has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS, not on Windows
        return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


class Session:
    """A model loaded into onnxruntime.

    Args:
        model: a file, or a graph in memory.
        runtime: how to execute.
        optimized: at onnxruntime's default graph optimisation level, or with none.
        values: names of inner values, activations and inputs alike, to return; None for the
            model's outputs.
        feedback: input → output that is fed back into it, see `calib.graph.Model`.

    Raises:
        ModelError: if onnxruntime cannot load the model.
        OptionError: if the provider is not available, or a custom operator library cannot be
            loaded.
    """

    def __init__(
        self,
        model: Source,
        runtime: Runtime | None = None,
        *,
        optimized: bool = True,
        values: Sequence[str] | None = None,
        feedback: Mapping[str, str] | None = None,
    ):
        runtime = runtime or Runtime()
        self._run_options = ort.RunOptions()
        self._feedback = dict(feedback or {})
        self._state: dict[str, NDArray[Any]] = {}
        if isinstance(model, Path) and values is not None:
            model = ir.load(model)
        wanted = None if values is None else [*values, *self._feedback.values()]
        scattered = runtime.scattered and optimized and values is not None
        scattered = scattered and not (runtime.provider or runtime.frugal or feedback)
        options = _options(runtime, optimized)
        with ExitStack() as scratch:
            if isinstance(model, Path):
                source = _Source(str(model))
            else:
                source = _source(model, wanted, options, scratch, scattered)
            self._session = _load(source.model, options, runtime, model)
            self._weights, self._moved = source.weights, source.moved
        self._inputs = {node.name: node for node in self._session.get_inputs()}
        outputs = [node.name for node in self._session.get_outputs()]
        self._from_feed = [name for name in values or () if name in self._inputs]
        last = {value: name for name, value in self._moved.items()}
        inner = [last.get(v, v) for v in values or () if v not in self._inputs]
        self._outputs = outputs if values is None else inner

    def run(self, feed: Mapping[str, NDArray[Any]], restart: bool = False) -> Values:
        """The wanted values by name: of a list its elements, ``name[0]`` and on; what was not
        produced, or is no array, is left out.

        Args:
            feed: arrays by input name. An input that is fed back may be left out.
            restart: forget what earlier feeds left behind; inputs that are fed back are zero.

        Raises:
            ModelError: if onnxruntime fails to run the model on ``feed``.
        """
        if restart:
            self._state = {}
        feed = {**self._zeros(feed), **self._state, **feed}
        captured: Values = {name: feed[name] for name in self._from_feed}
        fetched = list(dict.fromkeys([*self._outputs, *self._feedback.values()]))
        if not fetched:
            return captured
        try:
            arrays = self._session.run(fetched, feed, self._run_options)
        except Exception as error:
            shapes = ", ".join(f"{name!r} {list(array.shape)}" for name, array in feed.items())
            started = [name for name in self._feedback if name not in self._state]
            hint = f"; first values of {started[0]!r} can stand in the data" if started else ""
            raise ModelError(
                f"onnxruntime cannot run the model on {shapes}: {_reason(error)}{hint}"
            ) from error
        results = dict(zip(fetched, arrays, strict=True))
        self._state = {name: results[output] for name, output in self._feedback.items()}
        for name in self._outputs:
            if name in self._moved:
                captured[self._moved[name]] = results[name].transpose(CHANNELS_FIRST)
            else:
                captured.update(_arrays(name, results[name]))
        return captured

    def cancel(self) -> None:
        """Ends what is under way in other threads at the next node; nothing can be run after."""
        self._run_options.terminate = True

    def _zeros(self, feed: Mapping[str, NDArray[Any]]) -> Values:
        """The first values of inputs that are fed back: axes that share a symbol with an array of
        the feed are as long as there, other free ones are empty."""
        lengths: dict[Any, int] = {}
        for name, array in feed.items():
            if name in self._inputs:
                lengths.update(zip(self._inputs[name].shape, array.shape, strict=False))
        lengths.pop(None, None)  # an axis without a name is nobody else's
        zeros: Values = {}
        for name in self._feedback:
            node = self._inputs[name]
            shape = [d if isinstance(d, int) else lengths.get(d, 0) for d in node.shape]
            zeros[name] = np.zeros(shape, _NUMPY_TYPES[node.type])
        return zeros


def newest_opset() -> int:
    """The newest opset of the default domain at which the installed onnxruntime loads a quantized
    model; 1.32 has most of opset 28, but no QuantizeLinear."""
    for opset in range(_FIRST_UNKNOWN_OPSET, 1, -1):
        x, scale, y = (ir.val(name, ir.DataType.FLOAT, []) for name in "xsy")
        zero, stored = (ir.val(name, ir.DataType.UINT8, []) for name in "zq")
        nodes = [
            ir.Node("", "QuantizeLinear", [x, scale, zero], outputs=[stored]),
            ir.Node("", "DequantizeLinear", [stored, scale, zero], outputs=[y]),
        ]
        inputs, imports = [x, scale, zero], {"": opset}
        graph = ir.Graph(inputs, [y], nodes=nodes, opset_imports=imports, name="probe")
        with suppress(Exception):
            source = ir.to_proto(ir.Model(graph, ir_version=8)).SerializeToString()
            ort.InferenceSession(source, _options(Runtime(), False), ["CPUExecutionProvider"])
            return opset
    raise ModelError("onnxruntime loads no model at all: is it installed properly?")


def check_opset(model: ir.Model) -> None:
    """Raises `ModelError` if ``model`` has an opset above `newest_opset`."""
    opset = model.opset_imports.get("", 0)
    if opset > _LOADED_BY_ALL and opset > (newest := newest_opset()):
        raise ModelError(
            f"the model has opset {opset}, onnxruntime {ort.__version__} loads up to {newest}: "
            f"export it with that opset, or upgrade onnxruntime"
        )


def _load(
    source: str | bytes, options: ort.SessionOptions, runtime: Runtime, model: Path | ir.Model
) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(source, options, providers=[_provider(runtime)])
    except CalibError:
        raise
    except Exception as error:  # onnxruntime's exceptions have no common base
        if isinstance(model, Path):
            model = ir.load(model)
        check_opset(model)
        reason = _reason(error)
        hint = ": give the library that has it with --custom-ops" if _UNKNOWN_OP in reason else ""
        if any(v.dtype is ir.DataType.BFLOAT16 for n in model.graph for v in n.outputs):
            hint = ": it has no CPU kernels for bfloat16, which the model holds; use float16"
        raise ModelError(f"onnxruntime cannot load the model: {reason}{hint}") from error


def _arrays(name: str, value: Any) -> Iterator[tuple[str, NDArray[Any]]]:
    if isinstance(value, np.ndarray):
        yield name, value
    elif isinstance(value, list):
        for number, element in enumerate(value):
            yield from _arrays(f"{name}[{number}]", element)


def _reason(error: Exception) -> str:
    """onnxruntime's message without its error code and the place in its source."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", one_line(error))
    return re.sub(r"/\S+\.(cc|h):\d+ ", "", text)


def version() -> tuple[int, int]:
    """onnxruntime's major and minor version."""
    major, minor, *_ = ort.__version__.split(".")
    return int(major), int(minor)


def _provider(runtime: Runtime) -> str:
    available = ort.get_available_providers()
    if runtime.provider is None:
        return "CPUExecutionProvider"
    if runtime.provider not in available:
        raise OptionError(
            f"provider {runtime.provider!r} is not available in this onnxruntime; "
            f"available: {', '.join(available)}"
        )
    return runtime.provider


def _options(runtime: Runtime, optimized: bool) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = runtime.threads
    options.log_severity_level = _SEVERITY_FATAL
    level = ort.GraphOptimizationLevel
    for library in runtime.custom_ops:
        if not library.exists():
            raise OptionError(f"{library}: no such file")
        try:  # of a bare name, the loader would look in the system's folders
            options.register_custom_ops_library(str(library.absolute()))
        except Exception as error:
            raise OptionError(
                f"{library}: cannot be loaded as a custom operator library: {_reason(error)}"
            ) from error
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    if runtime.yielding:
        options.add_session_config_entry(_NO_SPINNING_BETWEEN_RUNS, "1")
        options.enable_mem_pattern = False  # its plan would take memory anew in the second run
    if runtime.exact:
        options.add_session_config_entry(EXACT, "0")
    if runtime.frugal:
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        if optimized:  # above this level, values are kept in a second layout, too
            options.graph_optimization_level = level.ORT_ENABLE_EXTENDED
    return options


@dataclass(slots=True)
class _Source:
    """What onnxruntime loads: a file, or a model whose larger weights it reads from ``weights``,
    which must outlive the session; and which values come with channels last."""

    model: str | bytes
    weights: dict[str, ort.OrtValue] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)


def _source(
    model: ir.Model,
    values: Sequence[str] | None,
    options: ort.SessionOptions,
    scratch: ExitStack,
    scattered: bool,
) -> _Source:
    """The model with ``values`` as its only outputs; itself it stays as it is. Weights are not
    copied: external data is read where it lies, if it lies in one folder."""
    graph = (part := part_for(model, values)).graph
    graphs = (graph, *model.graph.subgraphs())
    tensors = [t for g in graphs for v in g.initializers.values() if (t := v.const_value)]
    external = [t for t in tensors if isinstance(t, ir.ExternalTensor)]
    folders = {str(tensor.base_dir) for tensor in external}
    shared = shareable(part)
    apart = chain(external, (v.const_value for v in shared if v.const_value))
    inline = sum(tensor.nbytes for tensor in tensors) - sum(tensor.nbytes for tensor in apart)
    if len(folders) > 1 or inline > _MOST_INLINE_BYTES:
        try:
            folder = scratch.enter_context(tempfile.TemporaryDirectory(prefix="octav-calibrate-"))
            path = Path(folder, "model.onnx")
            ir.save(copy_for(model, values), path, external_data="model.data")
        except OSError as error:
            raise ModelError(
                f"{tempfile.gettempdir()}: no working copy of the model can be written: "
                f"{error.strerror or one_line(error)}; let TMPDIR name a folder with room"
            ) from error
        return _Source(str(path))
    if folders:
        options.add_session_config_entry(_FOLDER_OF_EXTERNAL_DATA, folders.pop() or ".")
    proto, arrays = take_out(part, shared)
    weights = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    if weights:
        options.add_external_initializers(list(weights), list(weights.values()))
    moved = put_channels_last(proto, in_blocks(part)) if scattered else {}
    return _Source(bytes(proto.SerializeToString()), weights, moved)
