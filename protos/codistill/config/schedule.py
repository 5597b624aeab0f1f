"""Which training steps exchange something, and so which step belongs to which round."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EVERY_STEP", "ExchangeSchedule"]


@dataclass(frozen=True)
class ExchangeSchedule:
    """The steps that exchange: `start`, and from there one step in `every`. At all others students learn from labels alone.

    A worker counts steps, the server counts rounds. With the defaults the two counts are the same.

    Attributes:
        start: the first step that exchanges, counted from 0.
        every: steps from one round to the next.

    Example:
        >>> schedule = ExchangeSchedule(start=4, every=3)
        >>> [step for step in range(12) if schedule.exchanges(step)]
        [4, 7, 10]
        >>> schedule.rounds_before(8), schedule.step_of(2)
        (2, 10)
    """

    start: int = 0
    every: int = 1

    def exchanges(self, step: int) -> bool:
        """Return whether a step exchanges."""
        return step >= self.start and (step - self.start) % self.every == 0

    def rounds_before(self, step: int) -> int:
        """Return the number of rounds before a step. For a step that exchanges, this is its own round."""
        return max(0, -(-(step - self.start) // self.every))

    def step_of(self, round_number: int) -> int:
        """Return the step at which a round takes place, both counted from 0."""
        return self.start + round_number * self.every


EVERY_STEP = ExchangeSchedule()
