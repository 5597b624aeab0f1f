"""End a process that hangs, and name what hung.

The watched thread marks each activity with the time it may take; a thread of the watchdog counts. It counts capped ticks
instead of reading the clock. A process that was stopped for an hour, or whose machine slept, has not hung for an hour.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from codistill.process.exit_codes import ExitCode

__all__ = ["Watchdog"]

_INTERVAL = 0.25
_LONGEST_TICK = 2 * _INTERVAL
_REPORT_SECONDS = 5.0


@dataclass(frozen=True, eq=False)  # two marks with the same text are different marks
class _Mark:
    what: str
    seconds: float


class Watchdog:
    """Counts how long the watched thread has been at the same activity.

    Counting begins with :meth:`start`, or when it is entered as a context. Before that, marks have no effect.

    Args:
        end: called once with the line that names what hung. By default, it prints the line and every thread's stack to
            standard error, and ends the process with :attr:`ExitCode.HUNG`.
    """

    def __init__(self, end: Callable[[str], None] | None = None) -> None:
        self._end = end or _end_process
        self._mark: _Mark | None = None
        self._counted: _Mark | None = None
        self._spent = 0.0
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def start(self) -> None:
        """Begin to count, until the context or the process ends."""
        self._thread = threading.Thread(target=self._watch, name="codistill-watchdog", daemon=True)
        self._thread.start()

    def begin(self, what: str, seconds: float) -> None:
        """Mark the thread's next activity, which replaces the present one.

        Args:
            what: what it does, for people.
            seconds: the longest time it may take.
        """
        self._mark = _Mark(what, seconds)

    def tick(self, elapsed: float) -> str | None:
        """Count one tick.

        Args:
            elapsed: seconds since the tick before; capped.

        Returns:
            A line for people that names what hangs and for how long; None while nothing does.
        """
        mark = self._mark
        if mark is None or mark is not self._counted:
            self._counted, self._spent = mark, 0.0
            return None
        self._spent += min(elapsed, _LONGEST_TICK)
        if self._spent < mark.seconds:
            return None
        return f"hung for {mark.seconds:g} s: {mark.what}"

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(_INTERVAL):
            now = time.monotonic()
            line = self.tick(now - last)
            last = now
            if line is not None:
                self._end(line)
                return


def _end_process(line: str) -> None:
    def report() -> None:
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.write(f"error: {line}; the stacks of all threads are above; training.hang_after sets the limit\n")
        sys.stderr.flush()

    # The write of these lines may hang too.
    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    reporter.join(_REPORT_SECONDS)
    os._exit(ExitCode.HUNG)
