"""Models written for OpenVINO run there, in 8 bits, and give what onnxruntime gives."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Load, Save, calibrated
from models import run
from numpy.typing import NDArray
from test_target_models import net

from calib.graph import Model
from calib.planning import make_plan
from calib.rules import Rules
from calib.write import write_qdq

openvino: Any = pytest.importorskip("openvino")

IN_BYTES = ("u8", "i8")


def sqnr_db(reference: NDArray[Any], other: NDArray[Any]) -> float:
    noise = max(float(np.square(reference - other).sum()), 1e-12)
    return 10 * float(np.log10(np.square(reference).sum() / noise))


def compiled(path: Path) -> Any:
    core = openvino.Core()
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    return core.compile_model(core.read_model(path), "CPU", exact)


def precisions(model: Any) -> Counter[tuple[str, str]]:
    """How often each kind of layer runs in each precision."""
    found: Counter[tuple[str, str]] = Counter()
    for op in model.get_runtime_model().get_ops():
        info = op.get_rt_info()
        kind, precision = (
            str(getattr(info[key], "value", info[key])) for key in ("layerType", "runtimePrecision")
        )
        found[kind, precision] += 1
    return found


def check(model: Model, path: Path) -> tuple[Any, float]:
    """The compiled model, and how close its first output is to onnxruntime's."""
    table, feed = calibrated(model, Rules(target="openvino"))
    write_qdq(model, table).save(path)
    (wanted, *_), made = run(path, feed, optimized=True).values(), compiled(path)
    return made, sqnr_db(wanted, np.asarray(made(feed)[0]))


def test_all_layers_of_a_network_run_in_8_bits(save: Save, tmp_path: Path) -> None:
    made, close_db = check(net(save), tmp_path / "written.onnx")
    found = precisions(made)
    layers = {pair: n for pair, n in found.items() if pair[0] in ("Convolution", "FullyConnected")}
    # Two convolutions share a weight, which is why they stay float.
    assert sum(n for (_, precision), n in layers.items() if precision in IN_BYTES) == 3
    assert close_db > 25


def test_a_weight_that_two_layers_share_stays_float(save: Save) -> None:
    skipped = make_plan(net(save), Rules(target="openvino")).skipped
    assert {s.name: s.reason for s in skipped} == {
        f"{tensor} of /Conv/{layer}": "OpenVINO mixes up layers that share 'k3'"
        for tensor in ("pooled", "k3")
        for layer in ("left", "right")
    }


@pytest.mark.parametrize("name", ["conv_bn_relu", "conv_bias", "residual", "conv_transpose"])
def test_outputs_are_close_to_those_of_onnxruntime(name: str, load: Load, tmp_path: Path) -> None:
    _, close_db = check(load(name), tmp_path / "written.onnx")
    assert close_db > 25
