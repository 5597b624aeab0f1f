"""Heartbeats: a process sends one every second, and the process that started it listens.

A watchdog ends what hangs, but it cannot run in a process that is stopped, or in which something keeps every thread from
running. Heartbeats go through a pipe: no disk, network or server has to work for them.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time

__all__ = ["HEARTBEAT_VARIABLE", "Heartbeat", "announce_exit", "start_heartbeat"]

HEARTBEAT_VARIABLE = "CODISTILL_HEARTBEAT_FD"
"""The environment variable that names the pipe's descriptor to a child."""

_INTERVAL = 1.0
_LONGEST_TICK = 1.0
_HEARTBEAT = b"."
_LAST_HEARTBEAT = b"e"
_EXIT_SECONDS = 60.0  # more: at the end of Python no thread runs any more
_START_FACTOR = 12  # times the limit: as for loading, a start from a cold or distant disk holds up every thread of it

_descriptors: list[int] = []


class Heartbeat:
    """The heartbeat of a process as its parent hears it; decides when silence means that the process hangs.

    It counts its own ticks, capped, and not the clock's time. So where this process was stopped too, or the machine
    slept, that time is not taken for silence.

    Args:
        limit: seconds of silence after which a process hangs. Before the first heartbeat it is twelve times as long; once
            the process announced its exit, 60 s longer.
        now: when it was started, in seconds of a clock that never goes back.
    """

    def __init__(self, limit: float, now: float) -> None:
        self._limit = limit * _START_FACTOR
        self._limit_after_heartbeat = limit
        self._last_tick = now
        self._age_at_heartbeat = 0.0
        self._silence = 0.0
        self._announced: bool | None = None

    @property
    def broke_off(self) -> bool:
        """Whether the process sent heartbeats, and none that announced its exit: if it ended, something cut it short."""
        return self._announced is False

    def tick(self, now: float, heartbeats: bytes) -> str | None:
        """Let time go by.

        Args:
            now: the clock's time.
            heartbeats: what the pipe held since the last tick.

        Returns:
            A line for people that says that the process hangs; None while it does not.
        """
        elapsed = min(now - self._last_tick, _LONGEST_TICK)
        self._last_tick = now
        if heartbeats:
            self._announced = self._announced or _LAST_HEARTBEAT in heartbeats
            if _LAST_HEARTBEAT in heartbeats:
                self._limit_after_heartbeat += _EXIT_SECONDS
            self._age_at_heartbeat += self._silence + elapsed
            self._limit, self._silence = self._limit_after_heartbeat, 0.0
            return None
        self._silence += elapsed
        if self._silence < self._limit:
            return None
        return (
            f"killed after {self._limit:g} s without a sign of life, {self._age_at_heartbeat:.1f} s after its start: it was "
            "stopped, or something held all its threads; training.hang_after sets the limit"
        )


def start_heartbeat() -> None:
    """Send heartbeats from now on, to the end of this process.

    Does nothing in a process that no supervisor started.
    """
    value = os.environ.pop(HEARTBEAT_VARIABLE, "")
    if not value.isdigit():
        return
    descriptor = int(value)
    os.set_blocking(descriptor, False)
    _descriptors.append(descriptor)

    def send_heartbeats() -> None:
        while _send_heartbeat(descriptor):
            time.sleep(_INTERVAL)

    _send_heartbeat(descriptor)  # at once: whatever ends this process from here on, its parent knows that it was up
    threading.Thread(target=send_heartbeats, name="codistill-heartbeat", daemon=True).start()


def _send_heartbeat(descriptor: int) -> bool:
    """Send one, and return whether another can be of use."""
    try:
        os.write(descriptor, _HEARTBEAT)
    except BlockingIOError:  # the pipe is full: nobody reads for now
        return True
    except OSError:  # nobody will read again
        return False
    return True


def announce_exit() -> None:
    """Send the last heartbeat, if this process sends any."""
    for descriptor in _descriptors:
        with contextlib.suppress(OSError):
            os.write(descriptor, _LAST_HEARTBEAT)
