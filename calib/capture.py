"""Run a model in onnxruntime and read any of its values. The only door to onnxruntime."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort  # type: ignore[import-untyped, unused-ignore]
from numpy.typing import NDArray

from calib.errors import CalibError, ModelError, OptionError, one_line

_SEVERITY_FATAL = 4
_MOST_THREADS = 1024


@dataclass(frozen=True, slots=True)
class Runtime:
    """How onnxruntime executes.

    Args:
        provider: execution provider; None for the CPU.
        threads: intra-op threads; 0 leaves it to onnxruntime.

    Raises:
        OptionError: if threads are negative or absurdly many.
    """

    provider: str | None = None
    threads: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.threads <= _MOST_THREADS:
            raise OptionError(f"threads must be 0 to {_MOST_THREADS}, got {self.threads}")


class Session:
    """A model loaded into onnxruntime.

    Args:
        model: a file, or a graph in memory.
        runtime: how to execute.
        optimized: at onnxruntime's default graph optimisation level, or with none.
        values: names of inner values, activations and inputs alike, to return; None for the
            model's outputs.

    Raises:
        ModelError: if onnxruntime cannot load the model.
        OptionError: if the provider is not available.
    """

    def __init__(
        self,
        model: Path | ir.Model,
        runtime: Runtime | None = None,
        *,
        optimized: bool = True,
        values: Sequence[str] | None = None,
    ):
        runtime = runtime or Runtime()
        if isinstance(model, Path) and values is not None:
            model = ir.external_data.load_to_model(ir.load(model))
        source = str(model) if isinstance(model, Path) else _serialize(model, values)
        try:
            self._session = ort.InferenceSession(
                source, _options(runtime, optimized), providers=[_provider(runtime)]
            )
        except CalibError:
            raise
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise ModelError(f"onnxruntime cannot load the model: {_reason(error)}") from error
        inputs = {node.name for node in self._session.get_inputs()}
        outputs = [node.name for node in self._session.get_outputs()]
        self._from_feed = [name for name in values or () if name in inputs]
        self._outputs = outputs if values is None else [v for v in values if v not in inputs]

    def run(self, feed: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The wanted values by name.

        Raises:
            ModelError: if onnxruntime fails to run the model on ``feed``.
        """
        captured: dict[str, NDArray[Any]] = {name: feed[name] for name in self._from_feed}
        if not self._outputs:
            return captured
        try:
            results = self._session.run(self._outputs, dict(feed))
        except Exception as error:
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feed.items())
            raise ModelError(
                f"onnxruntime cannot run the model on {shapes}: {_reason(error)}"
            ) from error
        return captured | dict(zip(self._outputs, results, strict=True))


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
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = (
        levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    )
    return options


def _serialize(model: ir.Model, values: Sequence[str] | None) -> bytes:
    """The model with ``values`` as its only outputs; the model itself stays as it is."""
    if values is not None:
        model = model.clone()
        by_name = {v.name: v for node in model.graph for v in node.outputs}
        outputs = [by_name[name] for name in values if name in by_name]
        if outputs:  # a model must have one
            model.graph.outputs.clear()
            model.graph.outputs.extend(outputs)
    return bytes(ir.to_proto(model).SerializeToString())
