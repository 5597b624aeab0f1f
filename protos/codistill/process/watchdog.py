"""Ends a process that hangs, and says at what.

The thread that is watched marks what it begins and how long that may take; a thread of the watchdog counts. It counts its
own ticks and caps each of them, rather than reading how far the clock has moved: a process that was stopped for an hour,
or whose machine slept, has not hung for an hour.
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
_TELL_SECONDS = 5.0


@dataclass(frozen=True, eq=False)  # each mark is another one, whatever it says
class _Mark:
    what: str
    seconds: float


class Watchdog:
    """Counts how long the thread that is watched has been at the same thing.

    It starts to count when it is started, or entered as a context; without that, marks cost nothing and do nothing.

    Args:
        end: called once with the line that says what hung. By default it prints the line and every thread's stack to
            standard error and ends the process with :attr:`ExitCode.HUNG`.
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
        """Begins to count, to the end of the process if this is used as no context."""
        self._thread = threading.Thread(target=self._watch, name="codistill-watchdog", daemon=True)
        self._thread.start()

    def begin(self, what: str, seconds: float) -> None:
        """Marks what the thread begins, in place of what it was at, and how long that may take at most."""
        self._mark = _Mark(what, seconds)

    def tick(self, elapsed: float) -> str | None:
        """Lets time go by.

        Returns:
            What hangs and for how long, as a line for people; None while nothing does.
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
    def tell() -> None:
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.write(f"error: {line}; the stacks of all threads are above; training.hang_after sets the limit\n")
        sys.stderr.flush()

    # What hangs may be the writing of just these lines.
    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    teller.join(_TELL_SECONDS)
    os._exit(ExitCode.HUNG)
