"""One pass over the data: counters that equal what was fed, saved and loaded without loss."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import Load
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MODELS, Array, Feed, feed_for, parsed, run, values

from calib.arrays import Batch
from calib.counter import Counter
from calib.errors import DataError, ModelError, ObservationsError, OutputError
from calib.graph import Model, quantizable_uses
from calib.observations import Observations
from calib.observing import Observing, observe

ANOTHER_FILE = "not a file that --save-observations wrote: "


def counted(*arrays: Array) -> Counter:
    counter = Counter()
    for array in arrays:
        counter.update(array)
    return counter


def facts(counter: Counter) -> tuple[object, ...]:
    exact = (counter.min, counter.max, counter.n_zero, counter.n_nan, counter.n_inf)
    return (counter.counts.tobytes(), *exact)


def assert_same(actual: Observations, expected: Observations) -> None:
    assert actual.model_sha256 == expected.model_sha256
    assert actual.n_samples == expected.n_samples
    pairs = zip(actual.batches, expected.batches, strict=True)
    for ours, theirs in [(actual.counters, expected.counters), *pairs]:
        assert list(ours) == list(theirs)
        assert [facts(c) for c in ours.values()] == [facts(c) for c in theirs.values()]


def activations(model: Model) -> list[str]:
    uses, _ = quantizable_uses(model)
    return list(dict.fromkeys(use.tensor for use in uses if use.kind == "activation"))


def cut(feed: Feed, ends: Sequence[int]) -> Iterator[Batch]:
    for start, end in zip([0, *ends], [*ends, None], strict=True):
        part = {name: array[start:end] for name, array in feed.items()}
        if len(next(iter(part.values()))):
            yield Batch(part)


def rich() -> Feed:
    """Values of all magnitudes, zeros and repeated ones among them."""
    x = values(40, 6, seed=5) * np.float32(10.0) ** np.arange(-3, 3, dtype=np.float32)
    x[::7] = 0
    x[5::9] = 0.25
    return {"x": x.astype(np.float32), "z": values(40, 5, seed=6)}


@pytest.mark.parametrize("name", MODELS)
def test_counters_hold_what_the_activations_are(name: str, load: Load) -> None:
    model, original = load(name), MODELS[name]()
    names = activations(model)
    feeds = [feed_for(original, n=n, seed=n) for n in (5, 2)]
    observations = observe(model, map(Batch, feeds), names)
    prepared = ir.to_proto(model.ir)
    for tensor in names:
        runs = [
            feed[tensor] if tensor in feed else run(prepared, feed, names=[tensor])[tensor]
            for feed in feeds
        ]
        expected, actual = counted(*runs), observations.counters[tensor]
        assert actual.n_finite == expected.n_finite == sum(r.size for r in runs)
        np.testing.assert_allclose([actual.min, actual.max], [expected.min, expected.max], 1e-5)
        moved = np.abs(actual.counts - expected.counts).sum() / 2
        assert moved <= 0.02 * expected.n_finite  # values at the border of two bins
    assert list(observations.counters) == names
    assert observations.model_sha256 == model.sha256
    assert observations.n_samples == sum(len(next(iter(f.values()))) for f in feeds)


@settings(deadline=None, max_examples=25)
@given(
    ends=st.lists(st.integers(0, 40), max_size=6).map(sorted),
    order=st.permutations(range(40)),
    keep=st.integers(0, 4),
)
def test_counts_do_not_depend_on_order_or_on_how_the_samples_are_cut(
    load: Load, ends: list[int], order: list[int], keep: int
) -> None:
    """``hidden`` is max(x, 0): onnxruntime computes it alike in any batch."""
    model, feed = load("gemm_activation"), rich()
    whole = observe(model, [Batch(feed)], ["hidden", "x"])
    shuffled = {name: array[order] for name, array in feed.items()}
    pieces = list(cut(shuffled, ends))
    observed = observe(model, pieces, ["hidden", "x"], Observing(keep))
    assert_same(Observations(observed.model_sha256, observed.n_samples, observed.counters), whole)
    assert facts(whole.counters["x"]) == facts(counted(feed["x"]))
    assert facts(whole.counters["hidden"]) == facts(counted(np.maximum(feed["x"], 0)))
    assert len(observed.batches) == min(keep, len(pieces))
    for piece, counters in zip(pieces, observed.batches, strict=False):
        assert facts(counters["x"]) == facts(counted(piece.feed["x"]))


def test_data_without_samples_is_refused(load: Load) -> None:
    for batches in ([], [Batch({"x": values(0, 6), "z": values(0, 5)})]):
        with pytest.raises(DataError, match=r"^the calibration data holds no samples$"):
            observe(load("gemm_activation"), batches, ["hidden"])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_in_the_data_are_named_with_their_sample(bad: float, load: Load) -> None:
    feed = rich()
    feed["z"][17, 2] = bad
    feed["z"][19, 0] = bad
    with pytest.raises(DataError) as caught:
        observe(load("gemm_activation"), cut(feed, [8, 16, 24]), ["hidden"])
    assert str(caught.value) == (
        f"calibration data: 'z' holds {'NaN' if np.isnan(bad) else 'infinity'} in sample 17: leave "
        f"it out, or mend the preprocessing"
    )


@pytest.mark.parametrize("keep", [0, 5])
@pytest.mark.parametrize("what", ["NaN", "infinite"])
def test_an_activation_that_is_not_finite_is_named(what: str, keep: int) -> None:
    """The square of 1e30 is infinite, and infinity minus itself NaN."""
    text = """(float[N,6] x) => (float[N,6] y) <float[6,6] weight> {
      large = Mul(x, x)
      none = Sub(large, large)
      linear = MatMul(large, weight)
      y = MatMul(none, weight)
    }"""
    model = Model(Path("m"), "", 0, ir.from_proto(parsed(text)), ())
    feed: Feed = {"x": values(9, 6)}
    feed["x"][7] = 1e30
    name = "none" if what == "NaN" else "large"
    with pytest.raises(ModelError) as caught:
        observe(model, cut(feed, [3, 6]), [name], Observing(keep))
    assert str(caught.value) == (
        f"activation {name!r} becomes {what} in the batch that starts at sample 6: the float "
        f"model overflows on this data, or the data is not preprocessed for it"
    )


def test_integers_are_not_searched_for_nan(load: Load) -> None:
    feed = feed_for(MODELS["embedding"](), n=3)
    assert observe(load("embedding"), [Batch(feed)], ["vectors"]).n_samples == 3


# --- files --------------------------------------------------------------------------------------

NUMBERS = st.floats(width=32, allow_nan=False)


@settings(deadline=None, max_examples=25)
@given(
    groups=st.lists(st.lists(NUMBERS, max_size=30), min_size=1, max_size=4),
    n=st.integers(1, 10**12),
)
def test_what_is_saved_is_loaded_without_loss(
    load: Load, groups: list[list[float]], n: int
) -> None:
    model = load("gemm_activation")
    counters = [
        {"a/b:0": counted(np.array(g, np.float32)), "empty": Counter(), "x": counted(values(3))}
        for g in groups
    ]
    observations = Observations(model.sha256, n, counters[0], tuple(counters[1:]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "seen.npz"
        observations.save(path)
        assert [p.name for p in Path(folder).iterdir()] == ["seen.npz"]
        assert_same(Observations.load(str(path), model), observations)


@pytest.fixture
def seen(load: Load, tmp_path: Path) -> Path:
    path = tmp_path / "seen.npz"
    model = load("gemm_activation")
    observe(model, [Batch(rich())], ["hidden", "x"], Observing(1)).save(path)
    return path


def refusal(path: Path, model: Model) -> str:
    with pytest.raises(ObservationsError) as caught:
        Observations.load(path, model)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_observations_of_another_model_are_refused(seen: Path, load: Load) -> None:
    other, own = load("conv_bias"), load("gemm_activation")
    assert refusal(seen, other) == (
        f"observed on another model (sha256 {own.sha256[:12]}...) than {other.path} "
        f"({other.sha256[:12]}...): observe again"
    )


def test_a_missing_file_is_refused(tmp_path: Path, load: Load) -> None:
    assert refusal(tmp_path / "none.npz", load("conv_bias")) == "no such file"


def test_other_files_are_refused(tmp_path: Path, load: Load) -> None:
    path = tmp_path / "other.npz"
    model = load("gemm_activation")
    for content in (b"", b"text", b"PK\x03\x04 not really"):
        path.write_bytes(content)
        assert refusal(path, model).startswith(ANOTHER_FILE)
    np.savez(path, images=values(3))
    assert refusal(path, model).startswith(ANOTHER_FILE)
    np.savez(path, observations=np.frombuffer(b'["a list"]', np.uint8))
    assert refusal(path, model).startswith(ANOTHER_FILE)
    array = tmp_path / "other.npy"
    np.save(array, values(3))
    assert refusal(array, model).startswith(ANOTHER_FILE)
    assert refusal(tmp_path, model).startswith(ANOTHER_FILE)


def test_observations_of_a_future_version_are_refused(seen: Path, load: Load) -> None:
    with np.load(seen) as arrays:
        content = dict(arrays)
    manifest = json.loads(content["observations"].tobytes())
    manifest = {"schema": 2, "renamed": manifest["names"]}
    content["observations"] = np.frombuffer(json.dumps(manifest).encode(), np.uint8)
    np.savez(seen, **content)
    assert refusal(seen, load("gemm_activation")) == (
        "written with schema 2, this version reads 1: observe again"
    )


def test_a_damaged_file_is_refused_or_read_right(seen: Path, load: Load) -> None:
    model = load("gemm_activation")
    expected, content, refused = Observations.load(seen, model), seen.read_bytes(), 0
    for position in range(0, len(content), 61):
        damaged = content[:position] + b"\xff" * 8 + content[position + 8 :]
        for broken in (content[:position], damaged):
            seen.write_bytes(broken)
            try:
                observations = Observations.load(seen, model)
            except ObservationsError:
                refused += 1
            else:
                assert_same(observations, expected)
    assert refused > 20


def test_a_file_that_cannot_be_written_leaves_nothing_behind(
    seen: Path, load: Load, tmp_path: Path
) -> None:
    observations = Observations.load(seen, load("gemm_activation"))
    with pytest.raises(OutputError, match="cannot be written: "):
        observations.save(tmp_path / "no such folder" / "seen.npz")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="cannot be written: "):
        observations.save(tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "seen.npz"]


def test_the_file_holds_occupied_bins_only(seen: Path) -> None:
    assert seen.stat().st_size < 20_000
