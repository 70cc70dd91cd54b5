"""Weights in blocks, and weights alone: what is written, what is said, and what is refused."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from block_models import DIMS, blocks, network, table_of
from conftest import needs_onnxruntime
from models import Array
from onnx import numpy_helper

from calib import CalibError, Rules, Run, Widths, calibrate_model, compare_methods
from calib.capture import Runtime, Session
from calib.config import Config
from calib.granularity import Blocked
from calib.pipeline import Calibration
from calib.rules import Reduction, TensorRule
from cli.calibrate import main


@pytest.fixture
def room(tmp_path: Path) -> Path:
    onnx.save(network("MatMul"), tmp_path / "MatMul.onnx")
    return tmp_path


def written(room: Path, kind: str, rules: Rules, dtype: type = np.float32) -> Calibration:
    """The network, calibrated without data and verified."""
    path = room / f"{kind}.onnx"
    onnx.save(network(kind, dtype=dtype), path)
    return calibrate_model(path, None, rules, room / "out.onnx", Run(force=True))


def constants(path: Path) -> dict[str, Array]:
    model = onnx.load(path)
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


# --- what is written --------------------------------------------------------------------------


@pytest.mark.parametrize("activations", [None, 8])
@pytest.mark.parametrize(("size", "bits"), [(32, 4), (24, 3), (16, 8), (2, 2), (48, 16)])
@pytest.mark.parametrize("kind", ["MatMul", "Gemm", "GemmT"])
def test_every_width_and_length_is_written_and_verified_ragged_blocks_too(
    kind: str, size: int, bits: int, activations: int | None, room: Path
) -> None:
    made = written(room, kind, blocks(size, bits, activations))
    arrays, axis = constants(made.output), int(kind == "GemmT")
    for n, (inputs, outputs) in enumerate(pairwise(DIMS)):
        shape = (-(-inputs // size), outputs)
        assert arrays[f"w{n}_scale"].shape == (shape[::-1] if axis else shape)
        assert f"w{n}_zero_point" not in arrays
    nodes = [n for n in onnx.load(made.output).graph.node if n.input[0].startswith("w")]
    found = [{a.name: a.i for a in node.attribute} for node in nodes]
    assert found == [{"axis": axis, "block_size": size}] * 3
    assert any(note.startswith("opset raised from 17 to 21 for ") for note in made.notes)


@pytest.mark.parametrize("kind", ["MatMul", "GemmT"])
def test_max_of_a_block_is_the_largest_of_its_values_found_one_by_one(
    kind: str, room: Path
) -> None:
    made = written(room, kind, blocks(32, method="max"))
    arrays, weights = constants(made.output), constants(room / f"{kind}.onnx")
    for n in range(3):
        weight, scale = weights[f"w{n}"], arrays[f"w{n}_scale"]
        if kind == "GemmT":
            weight, scale = weight.T, scale.T
        for block, output in np.ndindex(scale.shape):
            values = weight[32 * block : 32 * (block + 1), output]
            assert scale[block, output] == np.float32(np.abs(values).max().astype(float) / 7)


@pytest.mark.parametrize("method", ["octav", "mse", "percentile:99", "entropy"])
def test_a_block_has_the_threshold_that_its_values_alone_have(method: str, room: Path) -> None:
    """The last block too, which nothing pads: as channels of a model of these values."""
    weight = constants(room / "MatMul.onnx")["w0"]
    whole = {r.name: r for r in table_of(room / "MatMul.onnx", blocks(32, method=method)).records}
    found = whole["w0"].threshold.reshape(4, -1)
    for block in range(4):
        part = network("MatMul", (32 if block < 3 else 4, 48, 40))
        tensor = next(t for t in part.graph.initializer if t.name == "w0")
        rows = weight[32 * block : 32 * (block + 1)]
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(rows), "w0"))
        onnx.save(part, room / "part.onnx")
        size = 32 if block < 3 else 4
        rules = blocks(size if block < 3 else 16, method=method)
        alone = {r.name: r for r in table_of(room / "part.onnx", rules).records}
        assert np.array_equal(alone["w0"].threshold, found[block])


def test_float16_has_blocks_too(room: Path) -> None:
    made = written(room, "MatMul", blocks(32), np.float16)
    assert constants(made.output)["w0_scale"].dtype == np.float16


def test_smaller_blocks_have_less_error_and_octav_less_than_max(room: Path) -> None:
    def decibels(size: int | None, method: str) -> Array:
        table = table_of(room / "MatMul.onnx", blocks(size, method=method))
        return np.array([record.sqnr_db for record in table.records])

    for method in ("max", "octav", "mse"):
        assert (decibels(16, method) > decibels(32, method)).all()
        assert (decibels(32, method) > decibels(None, method)).all()
    assert (decibels(32, "mse") > decibels(32, "octav")).all()
    assert (decibels(32, "octav") > decibels(32, "max")).all()


def test_a_rule_can_take_a_weight_out_of_the_blocks(room: Path) -> None:
    rules = blocks(32, overrides=(TensorRule("^w1$", granularity="per-channel"),))
    made = written(room, "MatMul", rules)
    kinds = {r.name: str(r.spec.granularity) for r in made.table.records}
    assert kinds == {
        "w0": "blocked(axis=0, 32)",
        "w1": "per-channel(axis=1)",
        "w2": "blocked(axis=0, 32)",
    }
    said = {r.name: r.notes for r in made.table.records}
    note = "no blocks: only a weight that MatMul or Gemm reads along one axis has any"
    assert [note in said[name] for name in ("w0", "w1", "w2")] == [False, True, False]


def test_the_summary_counts_blocks_instead_of_listing_them(room: Path) -> None:
    made = written(room, "MatMul", blocks(32))
    entry = made.summary()["tensors"][0]
    scale = constants(made.output)["w0_scale"]
    assert entry["granularity"] == "blocked(axis=0, 32)"
    ends = {"min": float(scale.min()), "max": float(scale.max())}
    assert entry["scale"] == {"blocks": 4 * 48, **ends}
    json.dumps(made.summary(), allow_nan=False)


# --- weights alone ----------------------------------------------------------------------------


def test_weights_alone_need_no_data_and_only_the_comparison_says_so(room: Path) -> None:
    made = calibrate_model(room / "MatMul.onnx", None, blocks(32))
    assert made.output == room / "MatMul-w4b32.onnx"
    assert made.warnings == ("NO DATA: the models were compared on made-up inputs; give --data",)
    assert made.table.n_samples == 0
    assert {r.spec.kind for r in made.table.records} == {"weight"}


def test_the_command_line_takes_none_and_a_block_size(
    room: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--weight-bits", "4", "--activation-bits", "none", "--block-size", "32"]
    assert main([str(room / "MatMul.onnx"), *options]) == 0
    captured = capsys.readouterr()
    assert "3 weights (1 at 4 bits, 2 at 8 bits), 0 activations" in " ".join(captured.out.split())
    assert "the models were compared on made-up inputs" in captured.err
    assert (room / "MatMul-w4b32.onnx").exists()
    for wrong in ("some", "4.5", "-1"):
        assert main([str(room / "MatMul.onnx"), "--activation-bits", wrong]) == 2
        error = capsys.readouterr().err
        assert "activation-bits must be" in error
        assert len(error.splitlines()) == 1


def test_bits_of_the_command_line_leave_activations_float_where_a_file_says_so() -> None:
    config = Config.parse("activation-bits: none\nweight-bits: 4")
    assert config.over({"bits": 8}) == Config(bits=8, activation_bits="none")
    assert config.to_rules().widths == Widths(4, None)
    assert Config.parse(config.to_yaml()) == config
    with pytest.raises(CalibError, match=r"activation-bits must be a whole number or none, got "):
        Config.parse("activation-bits: [4]")


def test_data_is_compared_on_where_there_is_any(room: Path) -> None:
    np.save(room / "x.npy", np.random.default_rng(0).standard_normal((40, 100)).astype(np.float32))
    made = calibrate_model(room / "MatMul.onnx", room / "x.npy", blocks(None))
    assert (made.warnings, made.comparison.n_samples) == ((), 40)
    assert made.output == room / "MatMul-w4.onnx"


def test_what_the_default_level_rounds_is_told_and_can_be_kept_from_it(room: Path) -> None:
    needs_onnxruntime(1, 31)
    made = written(room, "MatMul", blocks(32, bits=8))
    note = next(note for note in made.notes if "float input" in note)
    pattern = r".* lies ([0-9.]+) dB from the float model, computed in float32 ([0-9.]+) dB; .*"
    match = re.fullmatch(pattern, note)
    assert match is not None
    usual, exact = map(float, match.groups())
    assert usual < exact
    feed = {"x": np.random.default_rng(0).standard_normal((64, 100)).astype(np.float32)}
    float_model, exactly, plainly = (
        Session(path, Runtime(exact=True), optimized=optimized).run(feed)["y"]
        for path, optimized in (
            (room / "MatMul.onnx", True),
            (made.output, True),
            (made.output, False),
        )
    )
    assert np.abs(exactly - plainly).max() < 1e-5 * np.abs(float_model).max()


def test_layers_without_weights_are_named_as_float(room: Path) -> None:
    text = """<ir_version: 9, opset_import: ["" : 17]>
    attention (float[N,64,64] x) => (float[N,64,64] y) {
      q = MatMul(x, w)
      y = MatMul(q, x)
    }"""
    model = onnx.parser.parse_model(text)
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    onnx.save(model, room / "attention.onnx")
    made = calibrate_model(room / "attention.onnx", None, blocks(32))
    ((name, reason),) = [(s.name, s.reason) for s in made.table.skipped]
    assert name == "MatMul_y"
    assert reason == "it has no weight, and activation-bits is none"


def test_a_report_of_weights_alone_is_written(room: Path) -> None:
    pytest.importorskip("plotly")
    run = Run(report=room / "out.html")
    calibrate_model(room / "MatMul.onnx", None, blocks(32), run=run)
    assert "blocked(axis=0, 32)" in (room / "out.html").read_text("utf-8")


# --- what is refused --------------------------------------------------------------------------

CONV = """<ir_version: 9, opset_import: ["" : 17]>
conv (float[1,3,8,8] x) => (float[1,4,6,6] y) <float[4,3,3,3] k = {%s}> { y = Conv(x, k) }"""
PRODUCT = """<ir_version: 9, opset_import: ["" : 17]>
product (float[4,4] a, float[4,4] b) => (float[4,4] y) { y = MatMul(a, b) }"""
ABOUT = "is about activations, which activation-bits none keeps float: leave one of them out"
REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "size": ({"block_size": 1}, "block-size must be at least 2, got 1; onnxruntime is fast with "),
    "per-tensor": (
        {"block_size": 32, "weight_granularity": "per-tensor"},
        "block-size and weight-granularity per-tensor contradict each other: leave one out",
    ),
    "format": (
        {"weight_format": "gguf"},
        "weight-format must be qdq, matmulnbits, matmulnbits-int8, got 'gguf'",
    ),
    "no blocks": (
        {"weight_format": "matmulnbits"},
        "weight-format matmulnbits needs a block-size of 16, 32, 64, 128, 256, there is none;",
    ),
    "odd blocks": (
        {"weight_format": "matmulnbits", "block_size": 24},
        "weight-format matmulnbits needs a block-size of 16, 32, 64, 128, 256, it is 24; qdq",
    ),
    "activations": (
        {"weight_format": "matmulnbits", "block_size": 32, "widths": Widths(4, 8)},
        "weight-format matmulnbits takes activations as they are, activation-bits is 8: make",
    ),
    "16 bits": (
        {"weight_format": "matmulnbits", "block_size": 32, "widths": Widths(16, None)},
        "weight-format matmulnbits holds weights of 2 to 8 bits, weight-bits is 16: choose fewer,",
    ),
    "reduce": ({"reduction": Reduction("mean")}, f"reduce mean {ABOUT}"),
    "grids": ({"activations": "asymmetric"}, f"activations asymmetric {ABOUT}"),
    "rule": ({"overrides": (TensorRule("x", "activation", 8),)}, f"rules[0] {ABOUT}"),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
def test_settings_that_make_no_sense_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(CalibError) as caught:
        Rules(**{"widths": Widths(4, None), **given})  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_blocks_without_a_weight_to_cut_are_refused(room: Path) -> None:
    onnx.save(onnx.parser.parse_model(CONV % ",".join(["0.5"] * 108)), room / "conv.onnx")
    with pytest.raises(CalibError, match=r"^block-size 32: no weight of a MatMul or Gemm is "):
        calibrate_model(room / "conv.onnx", None, blocks(32))


def test_blocks_longer_than_every_weight_are_refused(room: Path) -> None:
    with pytest.raises(CalibError, match=r"^block-size 128: no weight has more than 100 values "):
        calibrate_model(room / "MatMul.onnx", None, blocks(128))
    calibrate_model(room / "MatMul.onnx", None, blocks(64))  # for the others it is one block


def test_weights_alone_of_a_model_without_weights_are_refused(room: Path) -> None:
    onnx.save(onnx.parser.parse_model(PRODUCT), room / "product.onnx")
    with pytest.raises(CalibError, match=r"activation-bits none leaves nothing to quantize: none "):
        calibrate_model(room / "product.onnx", None, blocks(None))


@pytest.mark.parametrize("name", ["observations", "save_observations", "max_memory", "workers"])
def test_observing_is_refused_where_there_is_nothing_to_observe(name: str, room: Path) -> None:
    run = Run(**{name: room / "seen.npz" if "obs" in name else 10**9})  # type: ignore[arg-type]
    with pytest.raises(CalibError, match=rf"^{name.replace('_', '-')} is about observing activa"):
        calibrate_model(room / "MatMul.onnx", None, blocks(32), run=run)


def test_a_comparison_of_methods_on_weights_alone_is_refused(room: Path) -> None:
    with pytest.raises(CalibError, match=r"^activation-bits none: methods are compared on weights"):
        compare_methods(room / "MatMul.onnx", None, rules=blocks(None))


def test_methods_can_be_compared_on_blocks(room: Path) -> None:
    survey = compare_methods(room / "MatMul.onnx", None, rules=blocks(32, activations=8))
    records = [r for row in survey.rows for r in row.table.records if r.spec.kind == "weight"]
    assert {r.spec.granularity for r in records} == {Blocked(0, 32)}
