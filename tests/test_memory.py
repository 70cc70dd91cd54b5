"""Observing within a bound on memory: what is done about it, and that it holds."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Load
from models import Feed
from test_observations import cut, rich

from calib import memory
from calib.arrays import Batch
from calib.capture import Runtime, Session, Values
from calib.errors import OptionError
from calib.graph import Model, load_model
from calib.memory import Fit, fit
from calib.observing import Observing, observe
from calib.planning import make_plan
from calib.rules import Rules
from calib.shapes import value_bytes

ROOT = Path(__file__).resolve().parents[1]
SIZE = 512
MEGA = 1_000_000

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells peak memory")


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Activations of 134 MB in all, the largest 67 MB."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "samples"))
        made = importlib.import_module("topologies").encoder_decoder(SIZE)
    path = tmp_path_factory.mktemp("unet") / "unet.onnx"
    onnx.save(made, path)
    return load_model(path)


@pytest.fixture(scope="module")
def free_batch(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The same network for any number of images, small ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "samples"))
        made = importlib.import_module("topologies").encoder_decoder(SIZE // 4)
    for value in (*made.graph.input, *made.graph.output, *made.graph.value_info):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    path = tmp_path_factory.mktemp("free") / "free.onnx"
    onnx.save(made, path)
    return load_model(path)


def image_batch(n: int, size: int, seed: int = 0) -> Batch:
    values = np.random.default_rng(seed).standard_normal((n, 3, size, size))
    return Batch({"image": values.astype(np.float32)})


def names_of(model: Model) -> tuple[str, ...]:
    return make_plan(model, Rules()).activations


def room_for(model: Model, batch: Batch) -> memory._Room:
    return memory._Room(model, batch, Runtime(threads=1), names_of(model))


def wanted(model: Model) -> Fit:
    return Fit(2, (names_of(model),), Runtime(threads=1))


def less_and_less(room: memory._Room, wanted: Fit, step: int) -> tuple[list[Fit], int, str]:
    """How each bound is met, the bound that is too little, and what is told of it."""
    found: list[Fit] = []
    for bound in range(room.resident + 2000 * MEGA, 0, -step):
        try:
            each = room.fit(wanted, bound)
        except OptionError as error:
            return found, bound, str(error)
        found.append(each)
        assert each.streams == 1 or "at a time" not in each.note
        at_a_time = (each.samples or room.samples) * each.streams
        if len(each.passes) == 1:
            assert room.needed(room.names, at_a_time * (1 if each.note else memory._ARENA)) <= bound
            continue
        others = (len(each.passes) - 1) * room.session
        assert all(room.needed(part) + others <= bound for part in each.passes)
    pytest.fail("no bound is too little")


def test_enough_memory_changes_nothing(unet: Model) -> None:
    batch = image_batch(1, SIZE)
    assert fit(unet, batch, names_of(unet), wanted(unet), 10**12) == wanted(unet)


def test_the_less_memory_the_less_at_a_time_until_it_is_too_little(unet: Model) -> None:
    room = room_for(unet, image_batch(1, SIZE))
    room.session = 20 * MEGA  # as if nothing that an earlier one freed were taken again
    found, bound, told = less_and_less(room, wanted(unet), step=5 * MEGA)
    assert [f.streams for f in found] == sorted((f.streams for f in found), reverse=True)
    assert [f.runtime.frugal for f in found] == sorted(f.runtime.frugal for f in found)
    n_passes = [len(f.passes) for f in found]
    assert n_passes == sorted(n_passes)
    assert {f.streams for f in found} == {1, 2}
    assert n_passes[-1] > 1
    for f in found:
        assert tuple(name for part in f.passes for name in part) == names_of(unet)
        assert bool(f.note) == f.runtime.frugal
    assert found[-1].note.endswith(
        f"one batch at a time, the model run {n_passes[-1]} times on each"
    )
    assert told.startswith(f"max-memory {bound / MEGA:.0f} MB is too little: with '")
    assert "allow more, or leave the tensor out with --exclude" in told


def test_a_batch_that_can_be_cut_is_cut_before_the_model_is_run_twice(free_batch: Model) -> None:
    room = room_for(free_batch, image_batch(16, SIZE // 4))
    found, _, _ = less_and_less(room, wanted(free_batch), step=MEGA // 2)
    samples = [f.samples or 16 for f in found]
    assert samples == sorted(samples, reverse=True)
    assert {8, 4, 2, 1} <= set(samples)
    assert all(f.samples == 1 for f in found if len(f.passes) > 1)
    assert any("4 samples at a time" in f.note for f in found)


# In a process of its own: what tests before have left behind would blur what is measured.
OBSERVED = """
import sys
import numpy as np
from calib import load_model, make_plan, observe, Rules, memory
from calib.arrays import Batch
from calib.capture import Runtime
from calib.observing import Observing

model, share = load_model(sys.argv[1]), float(sys.argv[2])
names = make_plan(model, Rules()).activations
rng = np.random.default_rng(0)
batches = [Batch({"image": rng.standard_normal((1, 3, 512, 512), np.float32)}) for _ in range(2)]
memory.fit(model, batches[0], names, memory.Fit(1, (names,), Runtime(threads=1)), 10**12)
room = memory._Room(model, batches[0], Runtime(threads=1), names)
least = max(room.needed([name]) for name in names)
bound = int(least + share * (room.needed(names) - least)) + 20_000_000
memory._PEAK_RESET.write_text("5")
seen = observe(model, batches, names, Observing(runtime=Runtime(threads=1), max_memory=bound))
peak = memory._peak()
free = observe(model, batches, names, Observing(runtime=Runtime(threads=1, frugal=True)))
same = all(np.array_equal(seen.counters[n].counts, free.counters[n].counts) for n in names)
print(same, peak <= bound, bound - peak, seen.notes[0])
"""


@pytest.mark.parametrize("share", [0.6, 0.1])
def test_the_bound_holds_and_the_integers_are_those_without_one(unet: Model, share: float) -> None:
    command = [sys.executable, "-c", OBSERVED, str(unet.path), str(share)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    same, held, _left, note = done.stdout.split(maxsplit=3)
    assert (same, held) == ("True", "True"), done.stdout
    assert "one batch at a time, the model run" in note


def test_parts_of_a_batch_count_as_the_batch(
    free_batch: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calib.samplewise._ROOM", 10**12)  # without a bound, the batch is whole
    batches, names = [image_batch(8, SIZE // 4, seed) for seed in range(3)], names_of(free_batch)
    lean = Runtime(threads=1, frugal=True)
    whole = observe(free_batch, batches, names, Observing(1, runtime=lean, halves=True))
    bounds = list[int]()

    class ForThreeSamples(memory._Room):  # a bound from another room would be of other memory
        def fit(self, wanted: Fit, max_memory: int) -> Fit:
            assert self.sets == 3  # both halves, and a batch
            bounds.append(min(max_memory, self.needed(self.names, 3)))
            return super().fit(wanted, bounds[-1])

    monkeypatch.setattr(memory, "_Room", ForThreeSamples)
    run, sizes = Session.run, list[int]()

    def noted(self: Session, feed: Feed, restart: bool = False) -> Values:
        sizes.append(len(feed["image"]))
        return run(self, feed, restart)

    monkeypatch.setattr(Session, "run", noted)
    how = Observing(1, runtime=lean, halves=True, max_memory=10**12)
    seen = observe(free_batch, batches, names, how)
    (bound,) = bounds
    assert seen.notes == (f"max-memory {bound / MEGA:.0f} MB: 2 samples at a time",)
    assert (sizes[-12:], set(sizes[:-12])) == ([2] * 12, {1})  # one to see what that takes
    assert (seen.n_batches, seen.half_samples) == (3, (16, 8))
    for name in names:  # onnxruntime may round otherwise in other batch sizes
        moved = np.abs(seen.counters[name].counts - whole.counters[name].counts).sum() / 2
        assert moved <= 1e-3 * whole.counters[name].n_finite
        assert seen.counters[name].n_finite == whole.counters[name].n_finite
        assert seen.batches[0][name].n_finite == whole.batches[0][name].n_finite


def test_a_mask_is_cut_with_its_batch(load: Load) -> None:
    model = load("gemm_activation")
    feed: Feed = rich()
    how = Observing(padding_mask="z", max_memory=10**12)
    masked = observe(model, cut(feed, [5, 11]), ["x"], how)
    assert masked.notes == ()


def test_sizes_of_values_are_those_that_they_have_on_the_batch(free_batch: Model) -> None:
    sizes = value_bytes(free_batch, image_batch(2, SIZE // 4), Runtime())
    pixels = (SIZE // 4) ** 2
    assert sizes["image"] == 2 * 3 * pixels * 4
    assert sizes["relu1"] == 2 * 32 * pixels * 4
    assert sizes[free_batch.outputs[0].name] == 2 * 2 * pixels * 4


def test_a_system_that_does_not_tell_its_memory_is_named(
    unet: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    with pytest.raises(OptionError, match="max-memory needs a system that tells what memory"):
        fit(unet, image_batch(1, SIZE), names_of(unet), wanted(unet), 10**12)


def test_counters_of_halves_and_of_single_batches_take_memory_too(unet: Model) -> None:
    batch, names = image_batch(1, SIZE), names_of(unet)
    room = memory._Room(unet, batch, Runtime(threads=1), names)
    few = room.needed(names)
    room.sets = 7  # another room would measure anew, on memory that this one has freed
    more = room.needed(names) - few
    assert more == pytest.approx(6 * len(names) * memory._COUNTER_BYTES, rel=0.5)


def test_a_process_that_is_too_large_by_itself_gets_no_useless_advice(unet: Model) -> None:
    with pytest.raises(OptionError) as error:
        room_for(unet, image_batch(1, SIZE)).fit(wanted(unet), 10 * MEGA)
    assert str(error.value).endswith("on one batch: allow more")


def test_with_nothing_to_capture_no_bound_is_too_little(load: Load) -> None:
    model = load("gemm_activation")
    assert observe(model, cut(rich(), []), [], Observing(max_memory=10)).notes == ()


def test_a_system_that_tells_only_part_is_named_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    status = tmp_path / "status"
    status.write_text("VmSize: 1 kB\n")
    monkeypatch.setattr(memory, "_STATUS", status)
    with pytest.raises(OptionError, match="max-memory needs a system that tells"):
        memory._peak()
