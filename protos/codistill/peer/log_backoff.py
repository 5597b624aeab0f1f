"""When a wait that continues is worth another line in the log; pure."""

from __future__ import annotations

__all__ = ["LogBackoff"]

_FIRST_PAUSE = 5.0
_LONGEST_PAUSE = 60.0


class LogBackoff:
    """Doubles the seconds between two lines, up to one line a minute."""

    def __init__(self) -> None:
        self.begin(0.0)

    def begin(self, now: float) -> None:
        """Start with a new wait."""
        self._pause = _FIRST_PAUSE
        self._next = now + self._pause

    def due(self, now: float) -> bool:
        """Return whether to write a line; if so, the time to the next one starts now."""
        if now < self._next:
            return False
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        self._next = now + self._pause
        return True
