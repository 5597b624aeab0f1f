"""One participant's records of a kind, in bounded memory."""

from __future__ import annotations

from typing import Generic, TypeVar

from codistill.rundir.records import Measured, Paced

__all__ = ["Series", "better"]

_R = TypeVar("_R", Measured, Paced)


class Series(Generic[_R]):
    """The records of one participant and kind, one for each number of steps trained.

    Args:
        limit: the most records that are kept: evenly spaced ones, the newest among them. None keeps all.

    Attributes:
        count: the number of places with a record, kept or not.
        best: of the measurements that are not kept, the one with the highest accuracy.
    """

    def __init__(self, limit: int | None) -> None:
        self.count = 0
        self.best: Measured | None = None
        self._limit = limit
        self._stride = 1
        self._kept: dict[int, tuple[int, _R]] = {}  # by steps trained: its place among all, and the record
        self._newest = -1

    def add(self, record: _R) -> None:
        """Add a record; it replaces an earlier one of the same number of steps."""
        known = self._kept.get(record.steps_trained)
        if known is None:
            if self._stride > 1 and record.steps_trained < self._newest:
                return  # it was dropped before
            known = (self.count, record)
            self.count += 1
            if self._newest in self._kept and self._kept[self._newest][0] % self._stride:
                self._drop(self._newest)
        self._newest = max(self._newest, record.steps_trained)
        self._kept[record.steps_trained] = (known[0], record)
        if self._limit is not None and len(self._kept) > self._limit:
            self._stride *= 2
            between = [steps for steps, (place, _) in self._kept.items() if place % self._stride]
            for steps in between:
                if steps != self._newest:
                    self._drop(steps)

    def _drop(self, steps: int) -> None:
        _, record = self._kept.pop(steps)
        if isinstance(record, Measured):
            self.best = better(self.best, record)

    @property
    def records(self) -> tuple[_R, ...]:
        """The records that are kept, in the order of their steps."""
        return tuple(self._kept[steps][1] for steps in sorted(self._kept))


def better(one: Measured | None, other: Measured) -> Measured:
    """Return the measurement of higher accuracy; of equal ones, the one of fewer steps."""
    if one is None or other.accuracy > one.accuracy:
        return other
    return one if one.accuracy > other.accuracy or one.steps_trained <= other.steps_trained else other
