"""Shards: where they are cut, what a worker answers, and that their sum is exact."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Save
from models import parsed
from test_observations import facts

from calib import shards
from calib.arrays import Feeds
from calib.capture import Runtime, Session
from calib.counterfile import Counters
from calib.data import Data, Reading, open_data
from calib.errors import CalibError, ClusterError, DataError, ModelError, OptionError
from calib.graph import Model, load_model
from calib.memory import Fit
from calib.observations import Observations
from calib.observing import Observing, observe
from calib.shards import Shard, Task, Total, Uneven, count, cut, cut_uneven

DIGITS = Path(__file__).resolve().parents[1] / "samples/digits"
NAMES = ("x", "hidden")

# Samples of any length, which share a feed only with neighbours of their own length.
SEQUENCES = """(float[N,T,4] x, int64[N,T] mask) => (float[N,T,4] y) <float[4,4] weight = {
  1.5, 0, 0, -1, 0, 2, 0.5, 0, 0, 0, 3, 0, 0.25, 0, 0, 1}> {
  hidden = Exp(x)
  numbers = Cast<to = 1>(mask)
  one = Constant<value_ints = [2]>()
  wide = Unsqueeze(numbers, one)
  masked = Mul(hidden, wide)
  y = MatMul(masked, weight)
}"""


def all_facts(counters: Counters) -> dict[str, tuple[object, ...]]:
    return {name: facts(counter) for name, counter in counters.items()}


def everything(seen: Observations) -> dict[str, Any]:
    """All of it, down to the integers."""
    counters = (seen.counters, *seen.halves, *seen.batches)
    others = replace(seen, counters={}, halves=(), batches=())
    n_groups = len(seen.halves), len(seen.batches)
    return {"counters": list(map(all_facts, counters)), "others": others, "groups": n_groups}


def opened(model: Path, data: Path, batch_size: int = 8) -> tuple[Model, Feeds]:
    loaded = load_model(model)
    feeds = open_data(loaded, data, Reading(batch_size))
    assert isinstance(feeds, Feeds)
    return loaded, feeds


def total(task: Task, cuts: list[Shard]) -> Observations:
    """Shards counted in this process, the last ones first, as if sent there and back."""
    found = Total(task)
    for shard in reversed(cuts):
        counted = pickle.loads(pickle.dumps(count(pickle.loads(pickle.dumps(task)), shard)))  # noqa: S301
        assert isinstance(counted, shards.Counted), counted
        found.add(counted)
    return found.observations()


@pytest.fixture
def sequences(save: Save, tmp_path: Path) -> tuple[Path, Path]:
    """A model, and a folder of samples of different lengths, many of them padded."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "sequences"
    folder.mkdir()
    for number in range(40):
        length = 3 + number // 7 % 3
        x = rng.standard_normal((length, 4)).astype(np.float32)
        mask = (np.arange(length) < length - number % 2).astype(np.int64)
        np.savez(folder / f"{number}.npz", x=x, mask=mask)
    return save(parsed(SEQUENCES)), folder


# --- cutting ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_samples", "n_workers"), [(1, 1), (8, 2), (64, 2), (100, 3), (796, 1)])
@pytest.mark.parametrize("n_kept", [0, 5])
def test_shards_are_even_numbers_of_batches_and_together_all_samples(
    n_samples: int, n_workers: int, n_kept: int
) -> None:
    _, data = opened(DIGITS / "digits.onnx", DIGITS / "digits.npz")
    cuts = cut(data, n_samples, n_workers, n_kept)
    assert cuts == cut_or_full(cut_uneven(data, n_samples, n_workers, n_kept), full=True)
    assert (cuts[0].start, cuts[-1].stop) == (0, n_samples)
    assert [shard.stop for shard in cuts[:-1]] == [shard.start for shard in cuts[1:]]
    assert all((shard.stop - shard.start) % 16 == 0 for shard in cuts[:-1])
    assert [shard.n_kept for shard in cuts] == [n_kept] + [0] * (len(cuts) - 1)


def cut_or_full(cuts: list[Shard], *, full: bool) -> list[Shard]:
    return [*(replace(shard, full=full) for shard in cuts[:-1]), cuts[-1]]


def test_no_shard_of_a_large_set_is_so_large_that_its_loss_hurts() -> None:
    _, data = opened(DIGITS / "digits.onnx", DIGITS / "digits.npz")
    sizes = [shard.stop - shard.start for shard in cut(data, 1_000_000, 2)]
    assert sizes == sorted(sizes, reverse=True), "the last ones end together"
    assert (sizes[0], sizes[-1]) == (64 * 8, 2 * 8)


# --- the sum ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        Observing(),
        Observing(halves=True),
        Observing(3, halves=True),
        Observing(runtime=Runtime(threads=4)),
    ],
    ids=["whole", "halves", "first batches", "threads"],
)
def test_shards_add_up_to_what_one_process_counts(how: Observing) -> None:
    model, data = opened(DIGITS / "digits.onnx", DIGITS / "digits.npz")
    names = [spec.name for spec in model.inputs]
    one = observe(model, data.batches(0, 203), names, how)
    seen = total(Task.of(model, data, names, how), cut(data, 203, 2, how.keep_batches))
    assert everything(seen) == everything(one)
    assert one.halves or not how.halves


def test_what_a_bound_on_memory_costs_on_workers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = opened(DIGITS / "digits.onnx", DIGITS / "digits.npz")
    how = Observing(max_memory=10**12)
    assert total(Task.of(model, data, ["image"], how), cut(data, 64, 2)).notes == ()

    def smaller(_: object, __: object, ___: object, wanted: Fit, ____: int) -> Fit:
        return replace(wanted, samples=2, note="2 samples at a time")

    monkeypatch.setattr("calib.observing.fit", smaller)
    seen = total(Task.of(model, data, ["image"], how), cut(data, 64, 2))
    assert seen.notes == ("2 samples at a time",)
    one = observe(model, data.batches(0, 64), ["image"])
    assert everything(replace(seen, notes=())) == everything(one)


def test_a_single_batch_has_no_halves_on_workers_either() -> None:
    model, data = opened(DIGITS / "digits.onnx", DIGITS / "digits.npz")
    how = Observing(halves=True)
    one = observe(model, data.batches(0, 8), ["image"], how)
    seen = total(Task.of(model, data, ["image"], how), cut(data, 8, 2))
    assert everything(seen) == everything(one)


def test_batches_of_different_sizes_are_told_and_cut_where_one_process_cuts_them(
    sequences: tuple[Path, Path],
) -> None:
    model, data = opened(*sequences, batch_size=4)
    how = Observing(padding_mask="mask", halves=True)
    one = observe(model, data.batches(), NAMES, how)
    task = Task.of(model, data, NAMES, how)
    even = [count(task, shard) for shard in cut(data, data.n_samples, 1)]
    assert Uneven() in even
    seen = total(task, cut_uneven(data, data.n_samples, 1))
    assert everything(seen) == everything(one)


def test_the_mask_is_not_counted_and_what_it_does_not_fit_is_told(
    sequences: tuple[Path, Path],
) -> None:
    model, data = opened(*sequences, batch_size=4)
    names = (*NAMES, "y")
    how = Observing(padding_mask="mask")
    one = observe(model, data.batches(), names, how)
    plain = observe(model, data.batches(), names)
    assert one.counters["x"].n_finite < plain.counters["x"].n_finite
    seen = total(Task.of(model, data, names, how), cut_uneven(data, data.n_samples, 1))
    assert everything(seen) == everything(one)


def test_made_up_inputs_are_made_up_by_workers_too() -> None:
    model = load_model(DIGITS / "digits.onnx")
    data = open_data(model, None, Reading(8, seed=3))
    assert isinstance(data, Feeds)
    one = observe(model, data.batches(), ["image"])
    seen = total(Task.of(model, data, ["image"], Observing()), cut(data, data.n_samples, 2))
    assert everything(seen) == everything(one)


# --- errors -----------------------------------------------------------------------------------


@pytest.fixture
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Model, Feeds]]:
    """The sample by relative paths, with images as they are given."""
    onnx.save(onnx.load(DIGITS / "digits.onnx"), tmp_path / "digits.onnx")
    images = np.load(DIGITS / "digits.npz")["image"][:64]
    monkeypatch.chdir(tmp_path)

    def make(**samples: float) -> tuple[Model, Feeds]:
        changed = images.copy()
        for number, value in samples.items():
            changed[int(number.removeprefix("n"))] = value
        np.savez("digits.npz", image=changed)
        return opened(Path("digits.onnx"), Path("digits.npz"))

    return make


def answered(task: Task, start: int = 32) -> CalibError:
    found = count(task, Shard(start, start + 16))
    assert isinstance(found, CalibError), found
    assert pickle.loads(pickle.dumps(found)).args == found.args  # noqa: S301 - our own
    return found


@pytest.mark.parametrize("value", [np.nan, 3e38])
def test_a_sample_is_named_by_its_number_in_the_whole_set(
    value: float, digits: Callable[..., tuple[Model, Feeds]]
) -> None:
    model, data = digits(n37=value)
    names = ["image", next(iter(model.ir.graph)).outputs[0].name or ""]
    with pytest.raises(CalibError) as caught:
        observe(model, data.batches(), names)
    error = answered(Task.of(model, data, names, Observing()))
    assert (type(error), str(error)) == (type(caught.value), str(caught.value))
    assert type(error) is (DataError if np.isnan(value) else ModelError)
    assert "sample 37" in str(error) or "sample 32" in str(error)


def test_files_are_named_as_the_user_named_them(
    digits: Callable[..., tuple[Model, Feeds]],
) -> None:
    model, data = digits()
    task = Task.of(model, data, ["image"], Observing())
    Path("digits.npz").write_bytes(Path("digits.npz").read_bytes()[:9000])
    assert str(answered(task)).startswith("worker on ")
    assert " digits.npz: " in str(answered(task))


def test_another_model_other_data_and_other_versions_are_refused(
    digits: Callable[..., tuple[Model, Feeds]],
) -> None:
    model, data = digits()
    task = Task.of(model, data, ["image"], Observing())
    wrong = {
        r": digits\.onnx: is another model there than here$": replace(task, sha256="0" * 64),
        r": digits\.npz: is other data there than here, by names, sizes": replace(
            task, identity=""
        ),
        r": octav-calibrate and onnxruntime are \S+ and [\d.]+, here they are 0.0.1 and 1.2: "
        r"install the same$": replace(task, versions=("0.0.1", (1, 2))),
    }
    for message, other in wrong.items():
        error = answered(other)
        assert isinstance(error, ClusterError)
        with pytest.raises(ClusterError, match=rf"^worker on \S+{message}"):
            raise error
    Path("digits.onnx").unlink()
    assert str(answered(replace(task, names=()))).endswith(": digits.onnx: no such file")


def test_a_damaged_archive_is_noticed_by_workers_as_by_one_process(
    save: Save, tmp_path: Path
) -> None:
    model = save(parsed("(float[N,6] x) => (float[N,6] y) { y = Relu(x) }"))
    path = tmp_path / "data.npz"
    np.savez(path, x=np.random.default_rng(0).standard_normal((4000, 6)).astype(np.float32))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    loaded, feeds = opened(model, path)
    task = Task.of(loaded, feeds, ("x", "y"), Observing())
    answers = [count(task, shard) for shard in cut(feeds, feeds.n_samples, 2)]
    assert isinstance(answers[-1], DataError)
    assert "Bad CRC-32" in str(answers[-1])


def test_a_worker_keeps_its_session_until_a_shard_fails_or_another_task_comes(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save(parsed("(float[N,6] x) => (float[N,6] y) { y = Exp(x) }"))
    x = np.zeros((64, 6), np.float32)
    x[40] = 1000
    np.savez(tmp_path / "data.npz", x=x)
    loaded, feeds = opened(model, tmp_path / "data.npz")
    made: list[Session] = []

    def noted(*args: Any, **settings: Any) -> Session:
        made.append(Session(*args, **settings))
        return made[-1]

    monkeypatch.setattr(shards, "Session", noted)
    task = Task.of(loaded, feeds, ("x", "y"), Observing())
    n_made = []
    for start, one in ((0, task), (16, task), (32, task), (48, task), (0, task)):
        found = count(one, Shard(start, start + 16))
        assert isinstance(found, ModelError) == (start == 32)
        n_made.append(len(made))
    found = count(replace(task, names=("y",)), Shard(0, 16))
    assert isinstance(found, shards.Counted)
    assert [*n_made, len(made)] == [1, 1, 1, 2, 2, 3]


def test_batches_from_python_cannot_be_dealt_out() -> None:
    model = load_model(DIGITS / "digits.onnx")
    images = np.load(DIGITS / "digits.npz")["image"]
    data: Data = open_data(model, [images[:8]])
    with pytest.raises(OptionError, match=r"^workers need data in files, .* cannot be dealt out$"):
        Task.of(model, data, ["image"], Observing())


def test_feeds_that_depend_on_each_other_cannot_be_dealt_out() -> None:
    model = replace(load_model(DIGITS / "digits.onnx"), feedback={"a": "b"})
    with pytest.raises(OptionError, match=r"^workers cannot share the work with feed-back: each"):
        Task.of(model, open_data(model, DIGITS / "digits.npz"), ["image"], Observing())
