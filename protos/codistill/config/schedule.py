"""Which training steps exchange something."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EVERY_STEP", "ExchangeSchedule"]


@dataclass(frozen=True)
class ExchangeSchedule:
    """Round `start`, and from there one round in `every`, exchanges; in the others students learn from the labels alone.

    A worker counts training steps, the server what is exchanged. Where every round exchanges the two are the same.

    Attributes:
        start: the first round that exchanges.
        every: rounds from one exchange to the next.

    Example:
        >>> schedule = ExchangeSchedule(start=4, every=3)
        >>> [number for number in range(12) if schedule.exchanges(number)]
        [4, 7, 10]
        >>> schedule.exchanges_before(8), schedule.round(2)
        (2, 10)
    """

    start: int = 0
    every: int = 1

    def exchanges(self, number: int) -> bool:
        """Returns whether a round exchanges."""
        return number >= self.start and (number - self.start) % self.every == 0

    def exchanges_before(self, number: int) -> int:
        """Returns how many rounds before this one exchange; of one that does, that is its number as an exchange."""
        return max(0, -(-(number - self.start) // self.every))

    def round(self, exchange: int) -> int:
        """Returns the round in which an exchange takes place, both counted from 0."""
        return self.start + exchange * self.every


EVERY_STEP = ExchangeSchedule()
