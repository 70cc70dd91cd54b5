"""Counters of every other batch: both halves together are exactly what was counted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import Load
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Feed, parsed, values
from test_observations import counted, cut, facts, rich

from calib.capture import Runtime, Session, Values
from calib.counter import Counter
from calib.counterfile import Counters
from calib.data import Reading, open_data
from calib.errors import ObservationsError
from calib.graph import Model, load_model
from calib.observations import Observations
from calib.observing import Observing, observe
from calib.planning import make_plan
from calib.resuming import observe_split
from calib.rules import Rules
from calib.run import Run, Split

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ROOT / "samples/digits"


def all_facts(counters: Counters) -> dict[str, tuple[object, ...]]:
    return {name: facts(counter) for name, counter in counters.items()}


def assert_halves_add_up(seen: Observations) -> None:
    """Exactly: counts, minimum, maximum, zeros, NaN and infinities."""
    first, second = seen.halves
    assert list(first) == list(second) == list(seen.counters)
    for name, counter in seen.counters.items():
        total = Counter()
        total.merge(first[name])
        total.merge(second[name])
        assert facts(counter) == facts(total)
    assert sum(seen.half_samples) == seen.n_samples


def half_facts(seen: Observations) -> list[dict[str, tuple[object, ...]]]:
    return [all_facts(half) for half in (*seen.halves, seen.counters)]


def masked_model() -> Model:
    text = """(float[N,6] x, int64[N] mask) => (float[N,6] y) <float[6,6] weight> {
      squares = Mul(x, x)
      numbers = Cast<to = 1>(mask)
      y = MatMul(squares, weight)
    }"""
    return Model(Path("m"), "", 0, ir.from_proto(parsed(text)), ())


@settings(deadline=None, max_examples=25)
@given(ends=st.lists(st.integers(0, 40), max_size=8).map(sorted), keep=st.integers(0, 2))
def test_halves_hold_every_other_batch_and_add_up_to_everything(
    load: Load, ends: list[int], keep: int
) -> None:
    model, pieces = load("gemm_activation"), list(cut(rich(), ends))
    whole = observe(model, pieces, ["hidden", "x"], Observing(keep))
    seen = observe(model, pieces, ["hidden", "x"], Observing(keep, halves=True))
    assert all_facts(seen.counters) == all_facts(whole.counters)
    assert list(map(all_facts, seen.batches)) == list(map(all_facts, whole.batches))
    assert (whole.halves, whole.half_samples) == ((), (0, 0))
    if len(pieces) == 1:
        assert (seen.halves, seen.half_samples) == ((), (0, 0))
        return
    assert_halves_add_up(seen)
    for number, half in enumerate(seen.halves):
        dealt = pieces[number::2]
        assert facts(half["x"]) == facts(counted(*(piece.feed["x"] for piece in dealt)))
        assert seen.half_samples[number] == sum(piece.n_samples for piece in dealt)


def test_padding_is_counted_in_neither_half() -> None:
    feed: Feed = {"x": values(40, 6), "mask": (np.arange(40) % 3 > 0).astype(np.int64)}
    pieces = list(cut(feed, [7, 20, 33]))
    how = Observing(padding_mask="mask", halves=True)
    seen = observe(masked_model(), pieces, ["squares", "x"], how)
    assert_halves_add_up(seen)
    for half, dealt in zip(seen.halves, (pieces[::2], pieces[1::2]), strict=True):
        kept = [piece.feed["x"][piece.feed["mask"] != 0] for piece in dealt]
        assert facts(half["x"]) == facts(counted(*kept))


@pytest.mark.parametrize("given_in", [(0, 2), (1,), (), (0, 1, 2, 3)])
def test_a_tensor_that_some_batches_do_not_produce_is_counted_in_the_halves_that_do(
    given_in: tuple[int, ...], load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = list(cut(rich(), [5, 11, 18]))
    run = Session.run

    def partial(session: Session, feed: Feed, restart: bool) -> Values:
        found = run(session, feed, restart)
        number = next(n for n, piece in enumerate(pieces) if piece.feed["x"] is feed["x"])
        return found if number in given_in else {"x": found["x"]}

    monkeypatch.setattr(Session, "run", partial)
    seen = observe(load("gemm_activation"), pieces, ["hidden", "x"], Observing(halves=True))
    assert_halves_add_up(seen)
    for number, half in enumerate(seen.halves):
        dealt = [np.maximum(pieces[n].feed["x"], 0) for n in given_in if n % 2 == number]
        assert facts(half["hidden"]) == facts(counted(*dealt))


@pytest.mark.parametrize("n_before", [1, 2, 3, 4])
def test_what_is_resumed_has_the_halves_of_a_run_without_a_break(
    n_before: int, load: Load, tmp_path: Path
) -> None:
    model, pieces = load("gemm_activation"), list(cut(rich(), [5, 11, 18, 30]))
    whole = observe(model, pieces, ["hidden", "x"], Observing(halves=True))
    path = tmp_path / "seen.npz.partial"
    how = Observing(halves=True, checkpoint=lambda s: s.save(path), checkpoint_seconds=0)
    observe(model, pieces[:n_before], ["hidden", "x"], how)
    before = Observations.load(path, model)
    assert len(before.halves) == (2 if n_before > 1 else 0)
    resumed = Observing(resumed=before, halves=True)
    seen = observe(model, pieces[n_before:], ["hidden", "x"], resumed)
    assert_halves_add_up(seen)
    assert half_facts(seen) == half_facts(whole)
    assert seen.half_samples == whole.half_samples


def test_what_was_counted_without_halves_is_resumed_without_them(load: Load) -> None:
    model, pieces = load("gemm_activation"), list(cut(rich(), [5, 11, 18]))
    before = observe(model, pieces[:2], ["x"])
    seen = observe(model, pieces[2:], ["x"], Observing(resumed=before, halves=True))
    assert (seen.halves, seen.half_samples) == ((), (0, 0))
    assert facts(seen.counters["x"]) == facts(counted(rich()["x"]))


@pytest.mark.parametrize(
    ("halves", "samples", "sets"), [(False, 9, 1), (True, 9, 2), (False, 1, 1)]
)
def test_counting_takes_one_set_of_counters_and_with_halves_two(
    halves: bool, samples: int, sets: int, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Counter] = []

    class Noted(Counter):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    for module in ("observations", "observing"):
        monkeypatch.setattr(f"calib.{module}.Counter", Noted)
    names, n = ["hidden", "x"], len(rich()["x"])
    pieces = cut(rich(), list(range(samples, n, samples)))
    how = Observing(halves=halves, runtime=Runtime(threads=2))
    seen = observe(load("gemm_activation"), pieces, names, how)
    assert len(made) == len(names) * sets
    assert "x" in seen.counters
    assert "y" not in seen.counters
    assert len(made) == len(names) * sets
    assert facts(seen.counters["x"]) == facts(counted(rich()["x"]))


# --- files --------------------------------------------------------------------------------------


@pytest.fixture
def saved(load: Load, tmp_path: Path) -> Path:
    path = tmp_path / "seen.npz"
    how = Observing(1, halves=True)
    observe(load("gemm_activation"), cut(rich(), [16]), ["hidden", "x"], how).save(path)
    return path


def test_halves_are_saved_and_loaded_without_loss(saved: Path, load: Load) -> None:
    model = load("gemm_activation")
    seen, loaded = (
        observe(model, cut(rich(), [16]), ["hidden", "x"], Observing(1, halves=True)),
        Observations.load(saved, model),
    )
    assert_halves_add_up(loaded)
    assert half_facts(loaded) == half_facts(seen)
    assert loaded.half_samples == seen.half_samples == (16, 24)
    assert list(map(all_facts, loaded.batches)) == list(map(all_facts, seen.batches))


def contents(path: Path) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    with np.load(path) as arrays:
        content = dict(arrays)
    manifest: dict[str, object] = json.loads(content["observations"].tobytes())
    return content, manifest


def test_a_file_from_before_there_were_halves_is_loaded_without_them(
    saved: Path, load: Load
) -> None:
    model = load("gemm_activation")
    whole = Observations.load(saved, model)
    expected = all_facts(whole.counters)
    dataclasses.replace(whole, halves=(), half_samples=(0, 0)).save(saved)
    content, manifest = contents(saved)
    del manifest["half_samples"]
    content["observations"] = np.frombuffer(json.dumps(manifest).encode(), np.uint8)
    np.savez(saved, **content)  # type: ignore[arg-type]
    old = Observations.load(saved, model)
    assert (old.halves, old.half_samples) == ((), (0, 0))
    assert all_facts(old.counters) == expected


def test_a_damaged_file_with_halves_is_refused_or_read_right(saved: Path, load: Load) -> None:
    model, content, refused = load("gemm_activation"), saved.read_bytes(), 0
    expected = half_facts(Observations.load(saved, model))
    for position in range(0, len(content), 211):
        for broken in (content[:position], content[:position] + b"\xff" * 8 + content[position:]):
            saved.write_bytes(broken)
            try:
                found = Observations.load(saved, model)
            except ObservationsError:
                refused += 1
            else:
                assert half_facts(found) == expected
    assert refused > 20


@pytest.mark.parametrize("half_samples", [[1], [1, 2, 3], "many", 7])
def test_halves_that_are_not_two_are_refused(half_samples: object, saved: Path, load: Load) -> None:
    content, manifest = contents(saved)
    manifest["half_samples"] = half_samples
    content["observations"] = np.frombuffer(json.dumps(manifest).encode(), np.uint8)
    np.savez(saved, **content)  # type: ignore[arg-type]
    with pytest.raises(ObservationsError, match="not a file that --save-observations wrote"):
        Observations.load(saved, load("gemm_activation"))


# --- who asks for them ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "save", "expected"),
    [(False, False, (0, 0)), (True, False, (40, 24)), (False, True, (40, 24))],
)
def test_halves_are_kept_where_observations_are_saved_or_where_they_are_asked_for(
    asked: bool, save: bool, expected: tuple[int, int], tmp_path: Path
) -> None:
    model = load_model(DIGITS / "digits.onnx")
    reading = Reading(batch_size=24)
    run = Run(
        samples=64, reading=reading, save_observations=tmp_path / "seen.npz" if save else None
    )
    split = Split.of(open_data(model, DIGITS / "digits.npz", reading), run, None)
    rules = Rules()
    seen = observe_split(model, split, make_plan(model, rules), rules, halves=asked)
    assert seen.half_samples == expected
