"""Which training steps exchange something."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EVERY_STEP", "ExchangeSchedule"]


@dataclass(frozen=True)
class ExchangeSchedule:
    """The steps that exchange: `start`, and from there one step in `every`. At all others students learn from labels alone.

    A worker counts training steps, the server counts exchanges. With the defaults the two counts are the same.

    Attributes:
        start: the first step that exchanges, counted from 0.
        every: steps from one exchange to the next.

    Example:
        >>> schedule = ExchangeSchedule(start=4, every=3)
        >>> [step for step in range(12) if schedule.exchanges(step)]
        [4, 7, 10]
        >>> schedule.exchanges_before(8), schedule.round(2)
        (2, 10)
    """

    start: int = 0
    every: int = 1

    def exchanges(self, step: int) -> bool:
        """Return whether a step exchanges."""
        return step >= self.start and (step - self.start) % self.every == 0

    def exchanges_before(self, step: int) -> int:
        """Return the number of exchanges before a step. For a step that exchanges, this is the exchange's own number."""
        return max(0, -(-(step - self.start) // self.every))

    def round(self, exchange: int) -> int:
        """Return the step at which an exchange takes place, both counted from 0."""
        return self.start + exchange * self.every


EVERY_STEP = ExchangeSchedule()
