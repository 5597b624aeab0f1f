"""When a wait that goes on is worth another line in the log; pure."""

from __future__ import annotations

__all__ = ["LogBackoff"]

_FIRST_PAUSE = 5.0
_LONGEST_PAUSE = 60.0


class LogBackoff:
    """Each line comes after twice as long as the one before, and in the end once a minute."""

    def __init__(self) -> None:
        self.begin(0.0)

    def begin(self, now: float) -> None:
        """Takes in that a wait begins."""
        self._pause = _FIRST_PAUSE
        self._next = now + self._pause

    def due(self, now: float) -> bool:
        """Returns whether to write a line; the next is counted from now then."""
        if now < self._next:
            return False
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        self._next = now + self._pause
        return True
