"""Models with external data: what is read from disk, what is written, how much memory it takes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import all_bits
from models import feed_for, parsed, run, values

from calib import Run, calibrate_model, load_model
from calib.errors import ModelError, OptionError, OutputError
from calib.granularity import Granularity, PerChannel, PerTensor, pieces, to_groups

ROOT = Path(__file__).resolve().parents[1]
MODEL = parsed("""(float[N,32] x) => (float[N,32] output) <float[32,32] w1, float[32,32] w2> {
  hidden = MatMul(x, w1)
  output = MatMul(hidden, w2) }""")
FEED = feed_for(MODEL)


def save_external(path: Path, location: str = "weights.data") -> Path:
    copy = onnx.ModelProto()
    copy.CopyFrom(MODEL)
    path.parent.mkdir(exist_ok=True)
    onnx.save(copy, path, save_as_external_data=True, location=location, size_threshold=0)
    return path


def calibrated(path: Path, output: Path, external_data: str = "auto") -> Path:
    run_ = Run(external_data=external_data, force=True)
    return calibrate_model(path, [FEED], all_bits(8), output, run_).output


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def locations(path: Path) -> set[str]:
    model = onnx.load(path, load_external_data=False)
    return {
        e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"
    }


@pytest.mark.parametrize(
    ("external_data", "written"),
    [
        ("auto", ["out.onnx", "out.onnx.data"]),
        ("always", ["out.onnx", "out.onnx.data"]),
        ("never", ["out.onnx"]),
    ],
)
def test_the_output_has_external_data_where_the_input_has_or_it_is_asked_for(
    external_data: str, written: list[str], tmp_path: Path
) -> None:
    path = save_external(tmp_path / "in" / "model.onnx")
    before = {name: (tmp_path / "in" / name).read_bytes() for name in files(tmp_path / "in")}
    (tmp_path / "out").mkdir()
    output = calibrated(path, tmp_path / "out" / "out.onnx", external_data)
    assert files(tmp_path / "out") == written
    assert locations(output) == set(written[1:])
    assert {
        name: (tmp_path / "in" / name).read_bytes() for name in files(tmp_path / "in")
    } == before
    plain = tmp_path / "plain.onnx"
    onnx.save(MODEL, plain)
    same = calibrated(plain, tmp_path / "same.onnx")
    assert np.array_equal(run(output, FEED)["output"], run(same, FEED)["output"])


def test_a_model_in_one_file_stays_in_one_file(tmp_path: Path) -> None:
    onnx.save(MODEL, tmp_path / "model.onnx")
    calibrated(tmp_path / "model.onnx", tmp_path / "out.onnx")
    assert files(tmp_path) == ["model.onnx", "out.onnx"]
    calibrated(tmp_path / "model.onnx", tmp_path / "out.onnx", "always")
    assert files(tmp_path) == ["model.onnx", "out.onnx", "out.onnx.data"]


def test_the_data_of_an_output_that_is_replaced_goes_and_everything_else_stays(
    tmp_path: Path,
) -> None:
    """The old data file is in use until the new model stands, so the new one has another name."""
    path = save_external(tmp_path / "model.onnx", "out.onnx.weights.data")
    (tmp_path / "out.onnx.notes.data").write_text("not ours")
    for expected in ("out.onnx.data", "out.onnx.2.data", "out.onnx.data"):
        output = calibrated(path, tmp_path / "out.onnx")
        assert locations(output) == {expected}
        others = ["model.onnx", "out.onnx", "out.onnx.notes.data", "out.onnx.weights.data"]
        assert files(tmp_path) == sorted([expected, *others])


def test_the_data_of_the_input_is_not_removed_though_the_old_output_had_the_same(
    tmp_path: Path,
) -> None:
    path = save_external(tmp_path / "model.onnx", "out.onnx.data")
    (tmp_path / "out.onnx").write_bytes(path.read_bytes())
    calibrated(path, tmp_path / "out.onnx")
    assert files(tmp_path) == ["model.onnx", "out.onnx", "out.onnx.2.data", "out.onnx.data"]
    assert run(path, FEED)


def test_a_file_with_external_data_of_the_input_is_never_an_output(tmp_path: Path) -> None:
    path = save_external(tmp_path / "model.onnx")
    run_ = Run(force=True, summary=tmp_path / "weights.data")
    with pytest.raises(
        OutputError, match=r"weights\.data: is an input, which is never overwritten"
    ):
        calibrate_model(path, [FEED], run=run_)


def test_missing_external_data_is_named(tmp_path: Path) -> None:
    path = save_external(tmp_path / "model.onnx")
    (tmp_path / "weights.data").unlink()
    with pytest.raises(ModelError) as caught:
        load_model(path)
    assert "weights.data" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_external_data_that_is_cut_off_is_refused_in_one_line(tmp_path: Path) -> None:
    path = save_external(tmp_path / "model.onnx")
    data = tmp_path / "weights.data"
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(ModelError) as caught:
        calibrate_model(path, [FEED])
    assert "takes 4096 bytes, which do not stand at offset 0 of" in str(caught.value)
    assert files(tmp_path) == ["model.onnx", "weights.data"]


def test_an_unknown_way_to_write_external_data_is_refused() -> None:
    with pytest.raises(OptionError, match="external-data must be auto, always, never, got 'yes'"):
        Run(external_data="yes")


def test_weights_that_no_file_can_hold_are_not_written_into_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx.save(MODEL, tmp_path / "model.onnx")
    monkeypatch.setattr("calib.saving._PROTOBUF_LIMIT", 100)
    with pytest.raises(OutputError, match=r"GB of weights do not fit .* leave --external-data at"):
        calibrated(tmp_path / "model.onnx", tmp_path / "out.onnx", "never")
    assert files(tmp_path) == ["model.onnx"]


def test_weights_that_are_folded_come_from_memory_and_the_others_from_disk(tmp_path: Path) -> None:
    """A Transpose in front of one of two weights."""
    model = parsed("""(float[N,6] x) => (float[N,3] y) <float[4,6] w1, float[4,3] w2> {
      turned = Transpose<perm=[1,0]>(w1)
      hidden = MatMul(x, turned)
      y = MatMul(hidden, w2) }""")  # fmt: skip
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="w.data", size_threshold=0)
    loaded = load_model(path)
    kinds = {name: type(v.const_value).__name__ for name, v in loaded.ir.graph.initializers.items()}
    assert kinds["w2"] == "ExternalTensor"
    assert kinds["turned"] != "ExternalTensor"
    feed = {"x": values(8, 6)}
    output = calibrate_model(path, [feed], all_bits(16)).output
    assert np.allclose(run(output, feed)["y"], run(path, feed)["y"], atol=1e-2)


def test_more_weights_in_memory_than_protobuf_holds_go_through_a_scratch_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calib.capture._MOST_INLINE_BYTES", 100)
    onnx.save(MODEL, tmp_path / "model.onnx")
    output = calibrated(tmp_path / "model.onnx", tmp_path / "out.onnx")
    monkeypatch.undo()
    wanted = calibrated(tmp_path / "model.onnx", tmp_path / "wanted.onnx")
    assert np.array_equal(run(output, FEED)["output"], run(wanted, FEED)["output"])


@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (3, 5, 2), (1, 4, 1), (0, 3)])
@pytest.mark.parametrize("most", [1, 4, 100])
def test_pieces_cover_a_tensor_once_and_never_cut_a_group(
    shape: tuple[int, ...], most: int
) -> None:
    tensor = np.arange(int(np.prod(shape))).reshape(shape)
    grains: list[Granularity] = [PerTensor(), *(PerChannel(axis) for axis in range(len(shape)))]
    for granularity in grains:
        found = [tensor[index] for index, _ in pieces(shape, granularity, most)]
        assert (
            sorted(v for part in found for v in np.ravel(part).tolist()) == tensor.ravel().tolist()
        )
        if isinstance(granularity, PerChannel) and tensor.size:
            for index, groups in pieces(shape, granularity, most):
                whole = to_groups(tensor, granularity)[groups]
                assert np.array_equal(to_groups(tensor[index], granularity), whole)


def test_peak_memory_is_the_models_size_and_little_more(tmp_path: Path) -> None:
    """A third of a gigabyte here; samples/bench_large.py goes to 3 GB and beyond."""
    script = ROOT / "samples" / "bench_large.py"
    command = [
        sys.executable,
        str(script),
        "--gb",
        "0.33",
        "--margin",
        "0.5",
        "--method",
        "max",
        "--folder",
    ]
    done = subprocess.run(
        [*command, str(tmp_path)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"peak +0\.\d+ GB", done.stdout), json.dumps(done.stdout)
