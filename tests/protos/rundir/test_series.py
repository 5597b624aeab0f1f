from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from codistill.rundir.records import Measured
from codistill.rundir.series import Series, better
from protos.rundir.support import measured


@given(st.lists(st.integers(0, 40), min_size=1, max_size=300), st.integers(4, 12))
def test_a_bounded_series_keeps_its_newest_its_best_and_even_gaps(scores: list[int], limit: int) -> None:
    series = Series[Measured](limit)
    for number, score in enumerate(scores):
        series.add(measured("a", number, score / 40))
    kept = [record.steps_trained for record in series.records]
    assert len(kept) <= limit
    assert kept[0] == 0
    assert kept[-1] == len(scores) - 1
    assert len({later - earlier for earlier, later in itertools.pairwise(kept[:-1])}) <= 1
    assert series.count == len(scores)
    best = series.best
    for record in series.records:
        best = better(best, record)
    assert best is not None
    assert (best.accuracy, best.steps_trained) == (max(scores) / 40, scores.index(max(scores)))


def test_a_bounded_series_takes_a_resumed_students_repetitions_for_what_they_are() -> None:
    series = Series[Measured](8)
    for number in (*range(40), *range(25, 60)):
        series.add(measured("a", number, 0.5))
    assert series.count == 60
    assert len(series.records) <= 8
