"""From a trained model with quantizers to a QDQ model: the same table, writer and verification as
after calibration."""

from __future__ import annotations

import copy
import inspect
import logging
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from calib.arrays import Batch
from calib.capture import Session
from calib.comparison import Difference
from calib.errors import CalibError, ModelError, TrainingError, VerificationError, one_line
from calib.files import whole_file, writing
from calib.graph import Model, load_model
from calib.qat.grid import to_groups
from calib.qat.hooks import prepared_layers, restore
from calib.qat.marking import Places, mark, resolve_marks
from calib.qat.preparing import call, quantizers, unwrapped
from calib.qat.quantizer import Quantizer
from calib.qat.recording import FrozenWeight, Trained, trained_table
from calib.report.document import versions
from calib.run import Run, check_outputs
from calib.saving import constant_bytes
from calib.table import CalibrationTable, decibels
from calib.verification import verify
from calib.write import write_qdq

_MOST_INLINE = 1_000_000_000
_MARGIN_DB, _LOSS_DB, _SAME_DB = 10.0, 1.0, 100.0


@dataclass(frozen=True, slots=True)
class Exported:
    """What `export` wrote.

    Attributes:
        output: the QDQ model.
        table: every tensor's parameters; figures are those of the example inputs.
        sqnr_db: of its outputs in onnxruntime, with the prepared model's as reference.
        notes: what was changed or left out.
    """

    output: Path
    table: CalibrationTable
    sqnr_db: float
    notes: tuple[str, ...]


def export(
    model: nn.Module,
    example_inputs: object,
    path: str | Path,
    *,
    force: bool = False,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_shapes: Any = None,
) -> Exported:
    """Writes a prepared model as a verified QDQ model; ``model`` stays as it is.

    The weights are the integers of training: BatchNormalization behind a layer goes into their
    scales and signs. The model is exported in evaluation mode, with the stored thresholds.

    Args:
        model: prepared, trained for at least one step or calibrated; also compiled, or in
            `torch.nn.parallel.DistributedDataParallel`.
        example_inputs: what the model is called with: a tensor, a tuple of arguments or a
            dictionary of keyword arguments.
        path: file to write.
        force: overwrite it where it exists.
        input_names: as `torch.onnx.export` takes them.
        output_names: likewise.
        dynamic_shapes: likewise; None for a free first axis of all inputs, where the model allows
            it.

    Raises:
        TrainingError: if the model is not prepared, has a quantizer that saw no data, is not
            float32, or cannot be exported to ONNX.
        VerificationError: if the written model does not compute what the prepared one does.
        OutputError: if the file exists, or cannot be written.
    """
    target = Path(path)
    check_outputs([target], [], Run(force=force))
    frozen, trained = _frozen(model)
    inputs = pytree.tree_map_only(Tensor, lambda t: t.detach().cpu().clone(), example_inputs)
    expected = _outputs(frozen, inputs)
    with tempfile.TemporaryDirectory() as folder:
        program, notes = _traced(frozen, inputs, (input_names, output_names, dynamic_shapes))
        loaded, places = _load(program, trained, Path(folder) / f"{target.stem}-float.onnx")
        batch = Batch(_feed(loaded, inputs))
        table = trained_table(loaded, places, trained, batch)
        quantized = write_qdq(loaded, table.with_manifest(_manifest(loaded, trained)))
        with whole_file(target) as temporary, writing(target):
            written = quantized.write(temporary)
            verify(loaded, written, temporary, batch)
            sqnr_db = _compare_outputs(loaded, temporary, batch, expected)
    return Exported(target, quantized.table, sqnr_db, (*notes, *loaded.notes, *quantized.notes))


def _frozen(model: nn.Module) -> tuple[nn.Module, Trained]:
    """A copy on the CPU in evaluation mode, its weights on their grids, each layer's its own."""
    quantizers(model)
    frozen = copy.deepcopy(unwrapped(model)).cpu().eval()
    for name, parameter in frozen.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise TrainingError(
                f"{name} is {parameter.dtype}, only float32 models can be exported: "
                f"model.float() makes it one"
            )
    found = quantizers(frozen)
    for name, quantizer in found.items():  # marks need names that are the model's own
        quantizer.settings = replace(quantizer.settings, name=name)
    weights = {}
    with torch.no_grad():
        for _, layer, folder in prepared_layers(frozen):
            restore(layer)
            its = folder._modules.get("weight")
            if isinstance(its, Quantizer):
                name, weight = its.settings.name, layer.get_parameter("weight")
                layer.weight = nn.Parameter(its(weight), requires_grad=False)
                weights[name] = _frozen_weight(its, weight, layer.weight)
    for quantizer in found.values():
        if not quantizer.n_seen:
            quantizer.marker = _unseen
    return frozen, Trained(found, weights)


def _frozen_weight(quantizer: Quantizer, before: Tensor, after: Tensor) -> FrozenWeight:
    scale = (quantizer.current() / quantizer.grid.steps(quantizer.signed)).double()
    largest = to_groups(after, quantizer.settings.axis).double().abs().amax(1) / scale
    signal, noise = (float(t.double().square().sum()) for t in (before, before - after))
    return FrozenWeight(largest.round().numpy(), decibels(signal, noise))


def _unseen(_x: Tensor, name: str) -> Tensor:
    raise TrainingError(
        f"{name}: has no threshold yet: train for a step, or call calib.qat.calibrate before"
    )


def _outputs(model: nn.Module, inputs: object) -> list[NDArray[Any]]:
    try:
        with torch.no_grad():
            outputs = pytree.tree_leaves(call(model, inputs))
    except CalibError:
        raise
    except Exception as error:  # whatever the user's code and torch raise
        raise TrainingError(
            f"the model fails on the example inputs: {type(error).__name__}: {one_line(error)}"
        ) from error
    return [o.numpy() for o in outputs if isinstance(o, Tensor)]


def _traced(
    model: nn.Module, inputs: object, interface: tuple[Any, Any, Any]
) -> tuple[ir.Model, tuple[str, ...]]:
    """The graph with marks, and what to say of it."""
    for quantizer in quantizers(model).values():
        quantizer.marker = mark
    *names, shapes = interface
    attempts: list[tuple[object, Any, tuple[str, ...]]] = [(inputs, shapes, ())]
    if shapes is None:
        fixed = ("the batch is fixed, as the model's code depends on its size",)
        attempts = [(_doubled(inputs), _free_batch(model, inputs), ()), (inputs, None, fixed)]
    failure: Exception | None = None
    for example, attempt, notes in attempts:
        try:
            return _program(model, example, attempt, names), notes
        except Exception as error:  # whatever tracing makes a user's code and torch raise
            failure = error
    reason = one_line(failure.__cause__ or failure) if failure else ""
    raise TrainingError(f"the model cannot be exported to ONNX: {reason[:400]}") from failure


def _program(model: nn.Module, example: object, shapes: Any, names: Sequence[Any]) -> ir.Model:
    # Tracing leaves marks of its own on the tensors that it was given.
    example = pytree.tree_map_only(Tensor, torch.clone, example)
    keywords = isinstance(example, Mapping)
    logger = logging.getLogger("torch.onnx._internal.exporter")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it misses torchvision, whether a model needs it or not
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own libraries deprecate things
            program = torch.onnx.export(
                model,
                () if keywords else _tuple(example),
                kwargs=dict(example) if isinstance(example, Mapping) else None,
                dynamo=True,
                verbose=False,
                input_names=names[0],
                output_names=names[1],
                dynamic_shapes=shapes,
            )
    finally:
        logger.setLevel(level)
    assert program is not None
    return program.model


def _tuple(example: object) -> tuple[Any, ...]:
    return tuple(example) if isinstance(example, tuple | list) else (example,)


def _free_batch(model: nn.Module, inputs: object) -> Any:
    """For `torch.onnx.export`: the first axis of every tensor is free."""
    keywords = dict(inputs) if isinstance(inputs, Mapping) else {}
    args = () if keywords else _tuple(inputs)
    bound = inspect.signature(model.forward).bind(*args, **keywords).arguments
    return pytree.tree_map(
        lambda leaf: {0: "batch"} if isinstance(leaf, Tensor) and leaf.ndim else None, dict(bound)
    )


def _doubled(inputs: object) -> Any:
    """A batch of one taken twice, so that code that only works for one is not taken to work for
    all."""
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor) and t.ndim]
    if any(len(tensor) != 1 for tensor in tensors):
        return inputs
    return pytree.tree_map_only(Tensor, lambda t: torch.cat([t, t]) if t.ndim else t, inputs)


def _load(program: ir.Model, trained: Trained, file: Path) -> tuple[Model, Places]:
    parameters = {
        name: (q.qtype, tuple(q.current().tolist())) if not q.settings.is_weight else name
        for name, q in trained.quantizers.items()
    }
    places = resolve_marks(program, parameters)
    _remove_traces(program)
    external = f"{file.name}.data" if constant_bytes(program) > _MOST_INLINE else None
    ir.save(program, file, external_data=external)
    try:
        return load_model(file), places
    except ModelError as error:
        raise TrainingError(f"the exported graph is not valid: {error}") from error


def _remove_traces(program: ir.Model) -> None:
    """Takes out what the exporter tells of the user's source files."""
    graph = program.graph
    things = [program, graph, *graph, *graph.inputs, *graph.initializers.values()]
    things.extend(value for node in graph for value in node.outputs)
    for thing in things:
        for key in [k for k in thing.metadata_props if k.startswith("pkg.torch")]:
            del thing.metadata_props[key]


def _feed(model: Model, inputs: object) -> dict[str, NDArray[Any]]:
    names = [spec.name for spec in model.inputs]
    if isinstance(inputs, Mapping) and set(names) == set(inputs):
        tensors = [inputs[name] for name in names]
    else:
        tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    if len(names) != len(tensors):
        raise TrainingError(
            f"the exported graph has {len(names)} inputs ({', '.join(names)}), the example "
            f"{len(tensors)} tensors: leave out those that the model does not use"
        )
    return {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}


def _manifest(model: Model, trained: Trained) -> dict[str, Any]:
    settings = {name: q.extra_repr() for name, q in trained.quantizers.items()}
    return {
        "options": {"trained": settings},
        "versions": {**versions(), "torch": torch.__version__},
        "digests": {"model_sha256": model.sha256},
    }


def _compare_outputs(
    model: Model, path: Path, batch: Batch, expected: Sequence[NDArray[Any]]
) -> float:
    """SQNR of the written model against the prepared one.

    Raises:
        VerificationError: if it is as far from it as quantization makes it from the float one.
    """
    written, unquantized = (
        list(Session(file).run(batch.feed).values()) for file in (path, model.path)
    )
    found, quantization, further = Difference(), Difference(), Difference()
    for mine, theirs, plain in zip(expected, written, unquantized, strict=True):
        if mine.dtype.kind == "f":
            found.add(mine, theirs)
            quantization.add(plain, mine)
            further.add(plain, theirs)
    enough = min(quantization.sqnr_db + _MARGIN_DB, _SAME_DB)
    if found.sqnr_db < enough and further.sqnr_db < quantization.sqnr_db - _LOSS_DB:
        raise VerificationError(
            f"the exported model does not compute what the prepared one does: SQNR "
            f"{found.sqnr_db:.1f} dB, at least {enough:.1f} needed; please report the model"
        )
    return found.sqnr_db
