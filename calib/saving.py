"""A QDQ model in memory, and its way into files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from calib.errors import OutputError
from calib.files import whole_file, writing
from calib.table import CalibrationTable

# Writing weights into the model file itself takes them in memory several times.
_MOST_INLINE = 1_000_000_000
_PROTOBUF_LIMIT = 2_000_000_000


@dataclass(frozen=True, slots=True)
class Quantized:
    """A QDQ model in memory.

    Attributes:
        ir: the graph.
        table: what was written.
        stored: tensor → name of its integers; for a weight an initializer.
        dequantized: tensor → name of what its consumers read instead of it.
        notes: what had to change besides.
        external_data: the float model has external data.
        biases: layer → name of its int32 bias, dequantized.
        sources: tensor → what its pair reads, where the tensor's name went to the pair, as it is an
            output of the model.
        corrected: layer whose bias is corrected → name of the constant that holds it.
        uncorrected: that constant → the bias without the correction.
    """

    ir: ir.Model
    table: CalibrationTable
    stored: dict[str, str]
    dequantized: dict[str, str]
    notes: tuple[str, ...]
    external_data: bool = False
    biases: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    corrected: Mapping[str, str] = field(default_factory=dict)
    uncorrected: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """Size of all weights and other constants, as they will be stored."""
        return constant_bytes(self.ir)

    def save(self, path: Path, external_data: str = "auto") -> None:
        """Writes the model to ``path``, whole or not at all.

        Args:
            path: file to write.
            external_data: whether weights go into a file of their own beside it, named after
                it: ``always``, ``never``, or ``auto``: where they do in the float model, or are
                larger than 1 GB.

        Raises:
            OutputError: if the file cannot be written.
        """
        with whole_file(path) as temporary, writing(path):
            self.write(temporary, external_data)

    def write(self, path: Path, external_data: str = "auto", data: str | None = None) -> Quantized:
        """As `save`, straight to ``path``; ``data`` is the name of the other file. Returns the
        same, its weights on disk instead of in memory."""
        n_bytes = self.n_bytes
        if external_data == "auto":
            external = n_bytes > _MOST_INLINE or self.external_data
        else:
            external = external_data == "always"
        if not external and n_bytes > _PROTOBUF_LIMIT:
            raise OutputError(
                f"{path.name}: {n_bytes / 1e9:.1f} GB of weights do not fit into an ONNX file "
                f"itself: leave --external-data at auto"
            )
        if external:
            beside = path.with_name(data or f"{path.name}.data")
            ir.save(self.ir, path, external_data=beside.name)
            if beside.stat().st_size == 0:  # every tensor was small enough for the model file
                beside.unlink()
        else:
            ir.save(ir.external_data.load_to_model(self.ir.clone()), path)
        return replace(self, ir=ir.load(path))


def constant_bytes(model: ir.Model) -> int:
    """Size of all initializers of a graph, packed as they are stored."""
    tensors = (v.const_value for g in model.graphs() for v in g.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def size_ratio(source: ir.Model, quantized: Quantized) -> float:
    """Size of the constants of ``quantized`` beside that of ``source``'s."""
    return quantized.n_bytes / max(constant_bytes(source), 1)


def free_data_name(path: Path, others: Sequence[Path | None] = ()) -> str:
    """A name for the external data of a model at ``path`` that no file beside it has, so that a
    model that is being replaced keeps its own until the end; nor one of ``others``."""
    taken = {other.absolute() for other in others if other is not None}
    names = (f"{path.name}{infix}.data" for infix in ("", *(f".{n}" for n in range(2, 1000))))
    paths = (path.absolute().with_name(name) for name in names)
    return next(p.name for p in paths if p not in taken and not p.exists())


def external_files(path: Path) -> list[Path]:
    """Files of external data that `Quantized.write` wrote for the model at ``path``; none where
    there is no such model."""
    try:
        tensors = [v.const_value for v in ir.load(path).graph.initializers.values()]
    except Exception:  # whatever stands there is about to be replaced
        return []
    locations = {str(t.location) for t in tensors if isinstance(t, ir.ExternalTensor)}
    ours = re.compile(re.escape(path.name) + r"(\.\d+)?\.data")
    found = (name for name in sorted(locations) if ours.fullmatch(name))
    return [path.with_name(name).resolve() for name in found]
