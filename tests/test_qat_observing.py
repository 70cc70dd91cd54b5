"""From the values of a step to a threshold, and what of it is kept for the next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor

from calib.calibrators import make, thresholds
from calib.counter import Counter
from calib.distribution import Floats, Histogram, Samples
from calib.errors import TrainingError
from calib.qat.observing import ACTIVATION, ALONE, MOMENTUM, POOL_SIZE, WHOLE_WEIGHT, observe
from calib.qat.quantizer import Quantizer, TensorSettings
from calib.qtypes import QuantType

torch.set_num_threads(1)  # of tensors this small, on machines this busy: many times faster

SPECS = ("octav", "octav:paper,iterations=10", "percentile:99", "mse", "max")
specs = pytest.mark.parametrize("spec", SPECS)
NOT_FINITE = (
    "conv1.activation: holds NaN or infinity: the training data does, or training has diverged "
    "(try a lower learning rate)"
)


@dataclass
class Watched:
    """A tensor of 4 bits under observation; ``state`` are the buffers of a quantizer."""

    spec: str = "max"
    batches: int = 0
    axis: int = ACTIVATION
    groups: int = 1
    pooled: bool = False
    state: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        pool = torch.zeros(POOL_SIZE * self.pooled, dtype=torch.float64)
        weight = torch.tensor(self.axis != ACTIVATION)
        self.state = [torch.ones(self.groups), weight, torch.tensor(0), pool]

    def see(self, values: Tensor) -> list[float]:
        """Shows it a batch; the thresholds to quantize that with."""
        rest = (self.spec, 4, self.axis, self.batches, "conv1.activation")
        used = observe(values, *self.state, *rest)
        assert (used.dtype, used.shape) == (torch.float32, (self.groups,))
        assert used.data_ptr() != self.state[0].data_ptr()
        found: list[float] = used.tolist()
        return found

    @property
    def facts(self) -> tuple[Any, bool, int, int]:
        """Thresholds stored, sign, number of batches, and of values in the pool."""
        stored, signed, n_seen, pool = self.state
        return stored.tolist(), bool(signed), int(n_seen), int(pool[:-2].sum())


def drawn(n: int = 5, *, signed: bool = True, seed: int = 0) -> list[Tensor]:
    """Batches of growing magnitude."""
    noise = torch.Generator().manual_seed(seed)
    batches = [torch.randn(4, 3, 50, generator=noise) * (1 + 0.3 * k) for k in range(n)]
    return batches if signed else [batch.abs() for batch in batches]


def solved(spec: str, values: Tensor, *, signed: bool = True, axis: int | None = None) -> Floats:
    """What the calibrator says to NumPy of these values alone."""
    groups = values.reshape(1, -1) if axis is None else values.movedim(axis, 0).flatten(1)
    qtype = QuantType(4, signed, narrow=axis is not None)
    return thresholds(make(spec), Samples(groups.float().numpy()), qtype)[0]


# --- dynamic ------------------------------------------------------------------------------------


@specs
@pytest.mark.parametrize("signed", [True, False])
def test_a_dynamic_activation_uses_its_own_threshold_and_stores_the_running_mean(
    spec: str, signed: bool
) -> None:
    watched, mean = Watched(spec), 0.0
    for n, batch in enumerate(drawn(25, signed=signed)):
        used = watched.see(batch)
        assert used == pytest.approx(solved(spec, batch, signed=signed), rel=1e-3)
        mean += (used[0] - mean) * max(1 / (n + 1), MOMENTUM)
        assert watched.facts == ([pytest.approx(mean, rel=1e-5)], signed, n + 1, 0)


def test_the_running_mean_is_a_plain_one_at_first_and_forgets_like_batchnorm_later() -> None:
    watched = Watched("max")
    for value in range(1, 11):
        watched.see(torch.tensor([float(value)]))
        assert watched.facts[0][0] == pytest.approx((1 + value) / 2)
    norm = torch.nn.BatchNorm1d(1)
    norm.running_mean = torch.full((1,), 5.5)
    for later in (20.0, 30.0):
        watched.see(torch.full((2, 1), later))
        norm(torch.full((2, 1), later))
    assert watched.facts[0] == pytest.approx(norm.running_mean.tolist())


@specs
@pytest.mark.parametrize("axis", [WHOLE_WEIGHT, 0, 1])
def test_a_weight_stores_the_last_threshold_of_each_channel(spec: str, axis: int) -> None:
    watched = Watched(spec, axis=axis, groups=1 if axis < 0 else (4, 3)[axis])
    for n, weight in enumerate(drawn(3)):
        used = watched.see(weight)
        if axis < 0:
            qtype = QuantType(4, signed=True, narrow=True)
            expected = thresholds(make(spec), Samples(weight.reshape(1, -1).numpy()), qtype)[0]
        else:
            expected = solved(spec, weight, axis=axis)
        assert used == pytest.approx(expected, rel=1e-3)
        assert watched.facts == (used, True, n + 1, 0)


def test_an_all_zero_channel_has_the_harmless_threshold() -> None:
    watched = Watched("octav", axis=0, groups=3)
    weight = drawn(1)[0][:3].clone()
    weight[1] = 0
    used = watched.see(weight)
    assert used[1] == 1
    assert used[::2] == pytest.approx(solved("octav", weight[::2], axis=0), rel=1e-5)


# --- static -------------------------------------------------------------------------------------


@specs
def test_static_is_the_mean_over_its_batches_and_then_never_moves(spec: str) -> None:
    watched, batches = Watched(spec, batches=3), drawn(6)
    alone = [solved(spec, batch)[0] for batch in batches]
    for n, batch in enumerate(batches, 1):
        used = watched.see(batch)
        known = min(n, 3)
        assert used == pytest.approx([np.mean(alone[:known])], rel=1e-3)
        assert watched.facts == (used, True, known, 0)


@specs
def test_pooled_is_the_threshold_of_all_values_so_far(spec: str) -> None:
    watched, batches = Watched(spec, batches=3, pooled=True), drawn(5)
    for n, batch in enumerate(batches, 1):
        so_far = torch.cat(batches[: min(n, 3)])
        used = watched.see(batch)
        assert used == pytest.approx(solved(spec, so_far), rel=0.02 if spec == "mse" else 2.0**-7)
        counter = Counter()
        counter.update(so_far.numpy())
        if spec not in ("mse", "max"):  # whose candidates are 1 % apart; see below
            counted = thresholds(make(spec), Histogram(counter), QuantType(4, signed=True))[0]
            assert used == pytest.approx(counted, rel=1e-3)
        assert watched.facts == (used, True, min(n, 3), so_far.numel())


def test_the_largest_value_of_a_pool_is_exact() -> None:
    watched = Watched("max", batches=3, pooled=True)
    for n, batch in enumerate(drawn(3), 1):
        assert watched.see(batch) == [float(torch.cat(drawn(3)[:n]).abs().max())]


few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 3e38, 1e-40]) | st.floats(
    -(2.0**127), 2.0**127, width=32
)


@settings(max_examples=60, deadline=None)
@given(st.lists(hnp.arrays(np.float32, st.integers(1, 9), elements=few), min_size=1, max_size=4))
def test_the_pool_counts_as_the_counter_of_calibration_does(
    batches: list[NDArray[np.float32]],
) -> None:
    watched, counter = Watched("max", batches=9, pooled=True), Counter()
    for batch in batches:
        watched.see(torch.from_numpy(batch.copy()))
        counter.update(batch)
    pool = watched.state[3].numpy()
    assert np.array_equal(pool[:-2], counter.counts)
    # The range starts at 0, which is no matter: a threshold is about magnitudes.
    assert pool[-2:].tolist() == [min(counter.min, 0), max(counter.max, 0)]


def test_only_what_calibrates_is_awaited_by_a_static_activation() -> None:
    """Negative values behind the last batch are clipped, and no reason to start again."""
    watched = Watched("max", batches=2)
    for batch in drawn(2, signed=False):
        watched.see(batch)
    before = watched.facts
    watched.see(-9 * drawn(1)[0])
    assert watched.facts == before


# --- zeros, signs, nothing ----------------------------------------------------------------------


@pytest.mark.parametrize("batches", [0, 3])
@pytest.mark.parametrize("spec", ["octav", "mse", "max"])
def test_an_all_zero_batch_tells_nothing(spec: str, batches: int) -> None:
    watched, zeros = Watched(spec, batches=batches), torch.zeros(2, 9)
    assert watched.see(zeros) == [1.0]
    assert watched.facts == ([1.0], False, 0, 0)
    watched.see(drawn(1, signed=False)[0])
    before = watched.facts
    assert watched.see(-zeros) == before[0]
    assert watched.facts == before


@pytest.mark.parametrize("batches", [0, 4])
@pytest.mark.parametrize("spec", ["octav", "mse"])
def test_a_sign_that_turns_up_late_starts_anew_on_the_signed_grid(spec: str, batches: int) -> None:
    watched, (first, second, third) = Watched(spec, batches=batches), drawn(3)
    watched.see(first.abs())
    watched.see(first.abs())
    assert watched.facts[1:3] == (False, 2)
    used = watched.see(second)
    expected = solved(spec, second)
    assert expected != pytest.approx(solved(spec, second.abs(), signed=False), rel=0.02)
    assert used == pytest.approx(expected, rel=1e-5)  # from scratch, of this batch alone
    assert watched.facts == (used, True, 1, 0)
    watched.see(third.abs())  # stays signed
    both = (expected + solved(spec, third.abs())) / 2
    assert watched.facts[0] == pytest.approx(both, rel=1e-3)
    assert watched.facts[1:3] == (True, 2)


def test_a_late_sign_in_a_pool_keeps_the_values_before() -> None:
    watched, (first, second) = Watched("octav", batches=4, pooled=True), drawn(2)
    watched.see(first.abs())
    used = watched.see(second)
    both = torch.cat([first.abs(), second])
    assert used == pytest.approx(solved("octav", both), rel=2.0**-8)
    assert watched.facts == (used, True, 1, both.numel())


@pytest.mark.parametrize("batches", [0, 3, ALONE])
@pytest.mark.parametrize("axis", [ACTIVATION, WHOLE_WEIGHT])
@pytest.mark.parametrize("pooled", [True, False])
def test_an_empty_batch_tells_nothing(batches: int, axis: int, pooled: bool) -> None:
    watched = Watched("octav", batches=batches, axis=axis, pooled=pooled)
    before = watched.facts
    assert watched.see(torch.zeros(0, 7)) == [1.0]
    assert watched.facts == before


def quantizer(spec: str = "max", gradient: str = "pwl") -> Quantizer:
    batches = int(gradient != "pwl")
    settings = TensorSettings("conv1", "activation", 4, None, spec, batches, False, gradient)
    return Quantizer(settings, 1)


@pytest.mark.parametrize("batch", [torch.zeros(3), torch.zeros(0)], ids=["zeros", "empty"])
def test_a_learned_threshold_starts_from_the_first_batch_that_tells_one(batch: Tensor) -> None:
    for gradient, learned in (("pact", 8.0), ("lsq", 8.0 / 15)):
        found = quantizer(gradient=gradient)
        found(batch)
        found(torch.tensor([8.0, 3.0]))
        assert found.learned.tolist() == pytest.approx([learned])


# --- NaN and infinity ---------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seen", [0, 1, 3])
@pytest.mark.parametrize(
    "watched",
    [
        Watched("octav"),
        Watched("octav", batches=2),
        Watched("mse", batches=2, pooled=True),
        Watched("max", axis=WHOLE_WEIGHT),
        Watched("octav", axis=0, groups=4),
        Watched("octav", batches=1, axis=0, groups=4),
    ],
    ids=["dynamic", "static", "pooled", "weight", "channels", "static weight"],
)
def test_what_is_not_finite_is_an_error_naming_the_tensor(
    watched: Watched, seen: int, dtype: torch.dtype, bad: float
) -> None:
    """Also once a static threshold is settled."""
    watched.__post_init__()
    for batch in drawn(seen, signed=False):
        watched.see(batch)
    before = watched.facts
    broken = drawn(1)[0].to(dtype)
    broken[2, 1, 7] = bad
    with pytest.raises(TrainingError) as caught:
        watched.see(broken)
    assert str(caught.value) == NOT_FINITE
    assert watched.facts[:3] == before[:3]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_pool_goes_on_after_a_batch_that_was_refused(bad: float) -> None:
    watched = Watched("max", batches=2, pooled=True)
    with pytest.raises(TrainingError):
        watched.see(torch.tensor([1.0, bad]))
    assert watched.see(torch.tensor([2.0])) == [2.0]


# --- evaluation before training -----------------------------------------------------------------


@specs
def test_before_any_training_evaluation_warns_and_stores_nothing(spec: str) -> None:
    batch = drawn(1)[0]
    found = quantizer(spec).eval()
    for values, signed in ((batch, True), (batch.abs(), False), (batch * 3, True)):
        with pytest.warns(UserWarning, match="evaluated before it has seen a training batch"):
            back = found(values)
        limit = solved(spec, values, signed=signed)[0]
        assert float(back.max()) == pytest.approx(limit, rel=1e-3)
        assert (found.threshold.tolist(), bool(found.signed), int(found.n_seen)) == (
            [1.0],
            False,
            0,
        )
