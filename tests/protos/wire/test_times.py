"""Durations: to the nanosecond, there and back, and what no duration is."""

from __future__ import annotations

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from codistill.wire.times import duration, is_valid, seconds


@pytest.mark.parametrize(
    ("span", "whole", "nanos"),
    [
        (0, 0, 0),
        (1, 1, 0),
        (0.25, 0, 250_000_000),
        (1e-9, 0, 1),
        (59.999_999_999_9, 60, 0),
        (86_400.5, 86_400, 500_000_000),
    ],
)
def test_spans_are_kept_to_the_nanosecond(span: float, whole: int, nanos: int) -> None:
    made = duration(span)
    assert (made.seconds, made.nanos) == (whole, nanos)


@given(st.floats(0, 1e6))
def test_there_and_back(span: float) -> None:
    made = duration(span)
    assert is_valid(made)
    assert seconds(made) == pytest.approx(span, abs=1e-9)
    assert duration(seconds(made)) == made


def test_what_is_not_set_is_no_time() -> None:
    assert seconds(Duration()) == 0
    assert is_valid(Duration())


@pytest.mark.parametrize(
    ("whole", "nanos", "valid"),
    [
        (0, 999_999_999, True),
        (315_576_000_000, 0, True),
        (315_576_000_001, 0, False),
        (0, 1_000_000_000, False),
        (-1, 0, False),
        (0, -1, False),
        (-(2**63), -(2**31), False),
        (2**63 - 1, 2**31 - 1, False),
    ],
)
def test_what_may_come_from_outside(whole: int, nanos: int, valid: bool) -> None:
    assert is_valid(Duration(seconds=whole, nanos=nanos)) is valid
