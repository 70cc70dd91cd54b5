"""What `calib.making` makes is what the class itself makes."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, dataclass, replace
from typing import Any

import pytest

from calib.granularity import PerChannel
from calib.making import maker
from calib.planning import TensorSpec
from calib.qtypes import QuantType

FIELDS: Any = (
    "kernel",
    "weight",
    4,
    PerChannel(0),
    ("Conv",),
    "max",
    "float16",
    ("n",),
    "any",
    (),
    True,
)


def test_what_a_maker_makes_is_equal_in_all_that_can_be_done_with_it() -> None:
    made, plain = maker(TensorSpec)(*FIELDS), TensorSpec(*FIELDS)
    assert type(made) is TensorSpec
    assert (made, hash(made), repr(made)) == (plain, hash(plain), repr(plain))
    assert replace(made, bits=3) == replace(plain, bits=3)
    assert pickle.dumps(made) == pickle.dumps(plain)


def test_what_a_maker_makes_is_frozen() -> None:
    made = maker(TensorSpec)(*FIELDS)
    with pytest.raises(FrozenInstanceError):
        made.bits = 3  # type: ignore[misc]
    with pytest.raises((AttributeError, TypeError)):
        made.other = 3  # type: ignore[attr-defined]


def test_a_maker_wants_every_field() -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'everyone'"):
        maker(TensorSpec)(*FIELDS[:-1])


@dataclass(frozen=True)
class _WithoutSlots:
    number: int


@pytest.mark.parametrize("kind", [QuantType, _WithoutSlots, int])
def test_there_is_no_maker_of_what_checks_its_fields_or_has_no_slots(kind: type) -> None:
    with pytest.raises(TypeError, match="must be a dataclass with slots, and without __post_init_"):
        maker(kind)
