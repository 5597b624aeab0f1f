"""Whether a process runs at all: it gives a sign of life every second, and who started it listens.

A watchdog ends what hangs, but cannot run in a process that is stopped, or in which something keeps every thread from
running. The signs go through a pipe: no disk, network or server has to work for them.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time

__all__ = ["HEARTBEAT_VARIABLE", "Heartbeat", "announce_exit", "start_heartbeat"]

HEARTBEAT_VARIABLE = "CODISTILL_PULSE_FD"
"""The environment variable that names the pipe's descriptor to a child."""

_INTERVAL = 1.0
_LONGEST_TICK = 1.0
_SIGN = b"."
_LAST = b"e"
_ENDING = 60.0  # more: at the end of Python no thread runs any more
_STARTING = 12  # times the limit: as for loading, a start from a cold or distant disk holds up every thread of it


_given: list[int] = []


class Heartbeat:
    """Counts how long a process has given no sign of life.

    It counts its own ticks, capped: where this process was stopped too, or the machine slept, nobody has been silent.

    Args:
        limit: seconds of silence after which a process hangs; before its first sign, twelve times as many, and
            60 s more once it said that it ends.
        now: when it was started, in seconds of a clock that never goes back.
    """

    def __init__(self, limit: float, now: float) -> None:
        self._limit = limit * _STARTING
        self._later = limit
        self._last = now
        self._lived = 0.0
        self._silent = 0.0

    def tick(self, now: float, signs: bytes) -> str | None:
        """Lets time go by.

        Args:
            now: the clock's time.
            signs: of life, since the last tick.

        Returns:
            That it hangs, as a line for people; None while it does not.
        """
        elapsed = min(now - self._last, _LONGEST_TICK)
        self._last = now
        if signs:
            if _LAST in signs:
                self._later += _ENDING
            self._lived += self._silent + elapsed
            self._limit, self._silent = self._later, 0.0
            return None
        self._silent += elapsed
        if self._silent < self._limit:
            return None
        return (
            f"killed after {self._limit:g} s without a sign of life, {self._lived:.1f} s after its start: it was stopped, or "
            "something held all its threads; training.hang_after sets the limit"
        )


def start_heartbeat() -> None:
    """Gives signs of life from now on, to the end of this process.

    Does nothing in a process that was not started by one of ours.
    """
    descriptor = os.environ.pop(HEARTBEAT_VARIABLE, "")
    if not descriptor.isdigit():
        return
    os.set_blocking(int(descriptor), False)
    _given.append(int(descriptor))

    def give() -> None:
        while True:
            try:
                os.write(int(descriptor), _SIGN)
            except BlockingIOError:  # nobody listens for now
                pass
            except OSError:  # nor will again
                return
            time.sleep(_INTERVAL)

    threading.Thread(target=give, name="codistill-pulse", daemon=True).start()


def announce_exit() -> None:
    """Gives the last sign of life, if this process gives any."""
    for descriptor in _given:
        with contextlib.suppress(OSError):
            os.write(descriptor, _LAST)
