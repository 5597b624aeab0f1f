"""A virtual clock, and processes that live on it: generators that yield what they wait for."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator
from typing import Any

__all__ = ["Arm", "Kernel", "Process", "sleep"]

Arm = Callable[[Callable[[Any], None]], None]
"""The wait that a process yields: it calls the callable that it is given once, with the outcome."""


class Kernel:
    """Callbacks in the order of their times; time passes from one to the next, and not otherwise."""

    def __init__(self) -> None:
        self.now = 0.0
        self.trace: Callable[[str], None] | None = None
        self._queue: list[tuple[float, int, Callable[[], object]]] = []
        self._count = 0

    def clock(self) -> float:
        return self.now

    def after(self, seconds: float, callback: Callable[[], object]) -> None:
        self.at(self.now + seconds, callback)

    def at(self, when: float, callback: Callable[[], object]) -> None:
        """Call back at a time; at the same time in the order in which it was asked for."""
        self._count += 1
        heapq.heappush(self._queue, (max(when, self.now), self._count, callback))

    def run(self, until: float, stop: Callable[[], bool]) -> None:
        """Run callbacks up to a time, or until `stop` says so."""
        while self._queue and self._queue[0][0] <= until and not stop():
            self.now, _, callback = heapq.heappop(self._queue)
            callback()
        if not stop():
            self.now = max(self.now, until)

    def note(self, text: str) -> None:
        if self.trace is not None:
            self.trace(f"{self.now:10.4f}  {text}")


class Process:
    """A generator that can be killed and paused (SIGSTOP) at each of its waits."""

    def __init__(self, kernel: Kernel, body: Generator[Arm, Any, None], on_end: Callable[[], None]) -> None:
        self.alive = True
        self.paused = False
        self.paused_seconds = 0.0
        self._paused_at = 0.0
        self._kernel = kernel
        self._body = body
        self._on_end = on_end
        self._wait = 0
        self._due: tuple[Any] | None = None
        kernel.after(0, lambda: self._advance(None))

    def kill(self) -> None:
        self.alive = False
        self._wait += 1
        self._body.close()

    def pause(self) -> None:
        if self.alive and not self.paused:
            self.paused, self._paused_at = True, self._kernel.now

    def go_on(self) -> None:
        if not self.alive or not self.paused:
            return
        self.paused = False
        self.paused_seconds += self._kernel.now - self._paused_at
        if self._due is not None:
            (value,), self._due = self._due, None
            self._advance(value)

    def wake(self) -> None:
        """End the wait under way with None, as a signal does."""
        self._resume(self._wait, None)

    def _resume(self, wait: int, value: Any) -> None:
        if not self.alive or wait != self._wait or self._due is not None:
            return
        if self.paused:
            self._due = (value,)
        else:
            self._advance(value)

    def _advance(self, value: Any) -> None:
        if not self.alive:
            return
        if self.paused:
            self._due = (value,)
            return
        self._wait += 1
        wait = self._wait
        try:
            arm = self._body.send(value)
        except StopIteration:
            self.alive = False
            self._on_end()
            return
        arm(lambda came=None: self._resume(wait, came))


def sleep(kernel: Kernel, seconds: float) -> Arm:
    return lambda resume: kernel.after(seconds, lambda: resume(None))
