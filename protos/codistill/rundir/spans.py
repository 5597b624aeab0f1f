"""Spans of closed rounds: what was waited for, and how to keep them in order and few."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

from codistill.rundir.records import ParticipantWait, RoundsClosed

__all__ = ["add", "length", "longest_wait", "median_wait", "merged_by_two", "waited_for"]


def waited_for(spans: Sequence[RoundsClosed]) -> dict[str, ParticipantWait]:
    """Return the rounds and seconds that each participant was waited for, summed over spans."""
    rounds: Counter[str] = Counter()
    seconds: dict[str, float] = {}
    for span in spans:
        for name, wait in span.waits.items():
            rounds[name] += wait.rounds
            seconds[name] = seconds.get(name, 0.0) + wait.seconds
    return {name: ParticipantWait.model_construct(rounds=rounds[name], seconds=seconds[name]) for name in seconds}


def median_wait(spans: Sequence[RoundsClosed]) -> float | None:
    """Return the median of the spans' median waits in seconds, each counted once for every round of its span.

    It approximates the median over rounds: the records hold no wait of a single round. None without spans.
    """
    ordered = sorted(spans, key=lambda span: span.wait_p50)
    middle = sum(map(length, ordered)) / 2
    passed = 0
    for span in ordered:
        passed += length(span)
        if passed >= middle:
            return span.wait_p50
    return None


def longest_wait(spans: Sequence[RoundsClosed]) -> float | None:
    """Return the longest time from a round's first contribution to its last, in seconds; None without spans."""
    return max((span.wait_max for span in spans), default=None)


def length(span: RoundsClosed) -> int:
    """Return the number of a span's rounds."""
    return span.last - span.first + 1


def add(spans: list[RoundsClosed], span: RoundsClosed) -> None:
    """Insert a span in order, in place of those it overlaps: rounds may close again after a server's restart."""
    if not spans or spans[-1].last < span.first:
        spans.append(span)
        return
    spans[:] = [other for other in spans if other.last < span.first or other.first > span.last]
    place = len(spans)
    while place and spans[place - 1].first > span.first:
        place -= 1
    spans.insert(place, span)


def merged_by_two(spans: Sequence[RoundsClosed]) -> list[RoundsClosed]:
    """Return spans merged in pairs of neighbours; totals and the longest wait stay the same."""
    merged: list[RoundsClosed] = []
    for first, second in itertools.zip_longest(spans[::2], spans[1::2]):
        if second is None or second.first != first.last + 1:
            merged += [first] if second is None else [first, second]
            continue
        both = (first, second)
        known = [span.ensemble_accuracy for span in both if span.ensemble_accuracy is not None]
        merged.append(
            RoundsClosed(
                time=second.time,
                first=first.first,
                last=second.last,
                steps_trained=second.steps_trained,
                seconds=first.seconds + second.seconds,
                wait_p50=median_wait(both) or 0.0,
                wait_max=max(first.wait_max, second.wait_max),
                waits=waited_for(both),
                ensemble_accuracy=known[-1] if known else None,
                disagreement={**first.disagreement, **second.disagreement},
                missed=dict(Counter(first.missed) + Counter(second.missed)),
                without_targets=first.without_targets + second.without_targets,
            )
        )
    return merged
