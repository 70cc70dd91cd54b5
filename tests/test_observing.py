"""Two batches under way at a time: the same integers as one after the other, and no error lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import Load, Save
from models import Array, Feed, parsed
from test_observations import assert_same, cut, rich

from calib.arrays import Batch
from calib.capture import Runtime, Session, Values
from calib.counter import Counter, update_all
from calib.data import Reading, open_data
from calib.errors import DataError, ModelError
from calib.graph import Model, load_model
from calib.observations import Observations
from calib.observing import Observing, observe
from calib.planning import make_plan
from calib.rules import Rules

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["hidden", "x"]
ONE_BY_ONE = Runtime(threads=1)


def many(n: int = 24, single: bool = False) -> list[Batch]:
    """Batches of various lengths, or each of a sample."""
    if single:
        return list(cut(rich(), list(range(1, len(rich()["x"])))))
    feed = {name: np.tile(array, (4, 1)) for name, array in rich().items()}
    n_rows = len(feed["x"])
    ends = np.sort(np.random.default_rng(0).choice(np.arange(1, n_rows), n - 1, replace=False))
    return list(cut(feed, ends.tolist()))


def living() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("octav-calibrate")]


@pytest.fixture
def delayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Running and counting take their time, differently each time."""
    rng, run, update = np.random.default_rng(1), Session.run, update_all

    def slow_run(session: Session, feed: Feed, restart: bool = False) -> Values:
        time.sleep(rng.uniform(0, 0.006))
        found = run(session, feed, restart)
        time.sleep(rng.uniform(0, 0.002))
        return found

    def slow_update(counters: list[Counter], arrays: list[Array]) -> None:
        time.sleep(rng.uniform(0, 0.003))
        flat = [array.reshape(-1) for array in arrays]
        update(counters, [each[: each.size // 2] for each in flat])
        time.sleep(rng.uniform(0, 0.001))  # so that another thread could come between
        update(counters, [each[each.size // 2 :] for each in flat])

    monkeypatch.setattr(Session, "run", slow_run)
    monkeypatch.setattr("calib.observing.update_all", slow_update)


@pytest.fixture(params=[1, 8], ids="groups of {}".format)
def grouped(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calib.observing._GROUP", request.param)


@pytest.mark.usefixtures("delayed", "grouped")
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("keep_batches", [0, 3])
@pytest.mark.parametrize("single", [False, True], ids=["batches", "single samples"])
def test_with_random_delays_several_threads_count_what_one_does(
    halves: bool, keep_batches: int, single: bool, load: Load
) -> None:
    model = load("gemm_activation")
    how = {"keep_batches": keep_batches, "halves": halves}
    alone = observe(model, many(single=single), NAMES, Observing(**how, runtime=ONE_BY_ONE))  # type: ignore[arg-type]
    for threads in (2, 3):
        runtime = Runtime(threads=threads)
        both = observe(model, many(single=single), NAMES, Observing(**how, runtime=runtime))  # type: ignore[arg-type]
        assert_same(both, alone)
        assert len(both.batches) == keep_batches
        assert both.half_samples == alone.half_samples
    assert not living()


@pytest.mark.usefixtures("delayed")
def test_checkpoints_hold_whole_batches_however_long_each_takes(load: Load) -> None:
    seen: list[tuple[int, int]] = []

    def note(so_far: Observations) -> None:
        values = {so_far.counters[name].n_finite for name in ["x"]}
        seen.append((so_far.n_samples * 6, values.pop()))

    how = Observing(checkpoint=note, checkpoint_seconds=0.0, runtime=Runtime(threads=2))
    observe(load("gemm_activation"), many(), NAMES, how)
    assert len(seen) == 24
    assert all(expected == found for expected, found in seen)


def resnet20(fixtures_dir: Path, samples: int = 8) -> tuple[Model, list[Batch]]:
    model = load_model(fixtures_dir / "resnet20_cifar10.onnx")
    rng = np.random.default_rng(0)
    images = rng.standard_normal((96, 3, 32, 32), np.float32)
    return model, [Batch({"input": images[i : i + samples]}) for i in range(0, 96, samples)]


@pytest.mark.parametrize("samples", [1, 8])
def test_on_a_real_model_any_number_of_threads_gives_the_same_integers(
    fixtures_dir: Path, samples: int
) -> None:
    model, batches = resnet20(fixtures_dir, samples)
    names = make_plan(model, Rules()).activations
    alone = observe(model, batches, names, Observing(runtime=ONE_BY_ONE))
    for runtime in (None, Runtime(threads=2), Runtime(threads=4)):
        assert_same(observe(model, batches, names, Observing(runtime=runtime)), alone)


def test_what_fails_in_a_thread_ends_the_run_at_once_and_names_the_tensor(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    pulled = 0

    def endless() -> Iterator[Batch]:
        nonlocal pulled
        while True:
            pulled += 1
            yield from cut(rich(), [])

    def fail(_counters: list[Counter], _arrays: list[Array]) -> None:
        raise IndexError("broken\nin two lines")

    monkeypatch.setattr("calib.observing.update_all", fail)
    with pytest.raises(ModelError) as error:
        observe(load("gemm_activation"), endless(), ["hidden"], Observing())
    assert str(error.value) == "activation 'hidden' cannot be counted: broken in two lines"
    assert pulled <= 3
    assert not living()


def test_running_out_of_memory_in_a_thread_stays_what_it_is(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_counters: list[Counter], _arrays: list[Array]) -> None:
        raise MemoryError

    monkeypatch.setattr("calib.observing.update_all", fail)
    with pytest.raises(MemoryError):
        observe(load("gemm_activation"), cut(rich(), [5]), ["hidden"], Observing())


def test_the_elements_of_a_list_are_not_left_out_in_silence(save: Save) -> None:
    text = """(float[4] x) => (float[4] a, seq(float[2]) s) <int64 two = {2}> {
      a = Relu(x)
      s = SplitToSequence<axis=0>(x, two)
    }"""
    model, batch = load_model(save(parsed(text))), Batch({"x": np.ones(4, np.float32)})
    with pytest.raises(ModelError, match=r"'s\[0\]' cannot be counted: it is part of a list"):
        observe(model, [batch], ["a", "s"])


def test_the_first_of_two_bad_batches_is_named_though_the_second_is_sooner(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Session.run
    batches = list(cut(rich(), [5, 11, 18]))

    def late_infinity(session: Session, feed: Feed, restart: bool = False) -> Values:
        found = run(session, feed, restart)
        if feed["x"] is batches[2].feed["x"]:
            time.sleep(0.1)
        if feed["x"] is batches[2].feed["x"] or feed["x"] is batches[3].feed["x"]:
            found["hidden"] = np.full(3, np.inf, np.float32)
        return found

    monkeypatch.setattr(Session, "run", late_infinity)
    expected = "'hidden' becomes infinite in the batch that starts at sample 11"
    with pytest.raises(ModelError, match=expected):
        observe(load("gemm_activation"), batches, ["hidden"], Observing(runtime=Runtime(threads=2)))


@pytest.mark.usefixtures("delayed")
def test_an_error_in_the_data_ends_what_is_under_way(load: Load) -> None:
    bad = rich()
    bad["x"][30:] = np.nan
    with pytest.raises(DataError, match="in sample 30"):
        observe(load("gemm_activation"), cut(bad, [5, 11, 18]), NAMES, Observing())
    assert not living()


@pytest.mark.parametrize("distance", [1, 2, 3, 6])
@pytest.mark.parametrize("what", ["nan", "raises"])
@pytest.mark.parametrize("single", [False, True])
def test_what_fails_earlier_in_the_data_is_named_however_soon_it_is_read(
    save: Save, distance: int, what: str, single: bool
) -> None:
    model = load_model(save(parsed("(float[N,6] x) => (float[N,6] y) { y = Exp(x) }")))
    rows = 1 if single else 4

    def batches() -> Iterator[Batch]:
        yield Batch({"x": np.full((rows, 6), 1000, np.float32)})
        for _ in range(distance - 1):
            yield Batch({"x": np.zeros((rows, 6), np.float32)})
        if what == "raises":
            raise RuntimeError("the loader")
        yield Batch({"x": np.full((rows, 6), np.nan, np.float32)})

    with pytest.raises(
        ModelError, match="'y' becomes infinite in the batch that starts at sample 0"
    ):
        observe(model, batches(), ["y"])
    assert not living()


@pytest.mark.parametrize("single", [False, True])
def test_batches_may_come_in_the_same_memory(save: Save, single: bool) -> None:
    model = load_model(save(parsed("(float[N,64] x) => (float[N,64] y) { y = Relu(x) }")))

    def reusing() -> Iterator[Feed]:
        array = np.zeros((1 if single else 2000, 64), np.float32)
        for number in range(20):
            array[:] = number + 1
            yield {"x": array}

    seen = observe(model, open_data(model, reusing(), Reading()).batches(), ["y"])
    _, counts = seen.counters["y"].bins()
    assert counts.tolist() == [64 * (1 if single else 2000)] * 20


def test_ctrl_c_ends_a_run_of_the_model_that_is_under_way(
    fixtures_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = resnet20(fixtures_dir)
    large = Batch({"input": np.tile(batches[0].feed["input"], (125, 1, 1, 1))})
    run, under_way, ends = Session.run, threading.Event(), list[str]()

    def noted(session: Session, feed: Feed, restart: bool = False) -> Values:
        if feed["input"] is not large.feed["input"]:
            return run(session, feed, restart)
        under_way.set()
        try:
            found = run(session, feed, restart)
        except ModelError as error:
            ends.append(str(error))
            raise
        ends.append("it went on to its end")
        return found

    def interrupted() -> Iterator[Batch]:
        yield from [*batches[:3], large]
        assert under_way.wait(30)
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "run", noted)
    monkeypatch.setattr("calib.samplewise._ROOM", 10**12)  # all of it at a time takes long
    with pytest.raises(KeyboardInterrupt):
        observe(model, interrupted(), make_plan(model, Rules()).activations)
    assert len(ends) == 1
    assert "terminate" in ends[0]
    assert not living()


def test_a_session_that_is_cancelled_runs_nothing_more(load: Load) -> None:
    session = Session(load("gemm_activation").ir)
    session.run(rich())
    session.cancel()
    with pytest.raises(ModelError, match="onnxruntime cannot run the model"):
        session.run(rich())
