from __future__ import annotations

import statistics

from hypothesis import given
from hypothesis import strategies as st

from codistill.rundir import history, spans
from codistill.rundir.records import ParticipantWait, RoundsClosed
from protos.rundir.support import experiment, span


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0, 10)), min_size=1, max_size=30))
def test_the_median_wait_counts_a_span_once_for_each_of_its_rounds(drawn: list[tuple[int, float]]) -> None:
    closed: list[RoundsClosed] = []
    for rounds, wait in drawn:
        first = closed[-1].last + 1 if closed else 0
        closed.append(span(first, first + rounds - 1, wait))
    every_round = [wait for rounds, wait in drawn for _ in range(rounds)]
    assert spans.median_wait(closed) == statistics.median_low(every_round)


def test_without_spans_there_is_no_wait() -> None:
    assert spans.median_wait([]) is None
    assert spans.longest_wait([]) is None


def test_rounds_closed_again_replace_the_spans_they_overlap() -> None:
    again = span(10, 24, 0.5)
    run = history.collect(experiment(), [span(0, 9), span(10, 19), span(20, 29), again, span(30, 39)])
    assert [(each.first, each.last) for each in run.rounds] == [(0, 9), (10, 24), (30, 39)]
    assert run.rounds[1] == again
    late = history.collect(experiment(), [span(10, 19), span(0, 9)])
    assert [each.first for each in late.rounds] == [0, 10]


def test_waits_are_summed_over_spans() -> None:
    run = history.collect(experiment(), [span(0, 9, a=(4, 0.5), b=(6, 0.25)), span(10, 19, longest=3.0, a=(10, 1.5))])
    assert run.waits == {"a": ParticipantWait(rounds=14, seconds=2.0), "b": ParticipantWait(rounds=6, seconds=0.25)}
    assert run.closed_rounds == 20
    assert spans.longest_wait(run.rounds) == 3.0
