"""A network as gRPC's users see it: calls that may be lost either way, and streams that deliver a prefix and break.

Within a stream messages keep their order, and arrive until it breaks; each end notices a break in its own time, at the
latest when a keepalive is not answered. In the harsher modes messages of a stream are also doubled and overtake each other,
and bytes are damaged: a bit of a message is another one, or the message never arrives although the stream goes on.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from codistill.peer.steps import Failure
from simulation.kernel import Kernel

__all__ = ["CLIENT_KEEPALIVE", "SERVER_KEEPALIVE", "Link", "Stream", "Weather"]

CLIENT_KEEPALIVE, SERVER_KEEPALIVE = 30.0, 40.0
_WINDOW = 8
_OUTBOX = 64


@dataclass
class Weather:
    """How bad the network is; all zero once the faults stop."""

    delay: float = 0.01
    tail: float = 0.0
    lose_request: float = 0.0
    lose_reply: float = 0.0
    repeat: float = 0.0
    overtake: float = 0.0
    damage: float = 0.0
    swallow: float = 0.0


class Link:
    """The way between one student's machine and the server."""

    def __init__(self, kernel: Kernel, draw: random.Random, weather: Weather, faults: Counter[str]) -> None:
        self.kernel, self.draw, self.weather, self.faults = kernel, draw, weather, faults
        self.cut_until = 0.0
        self._held: list[Callable[[], None]] = []

    @property
    def cut(self) -> bool:
        return self.kernel.now < self.cut_until

    def cut_for(self, seconds: float) -> None:
        self.cut_until = max(self.cut_until, self.kernel.now + seconds)
        self.kernel.after(self.cut_until - self.kernel.now, self._release)

    def heal(self) -> None:
        self.cut_until = min(self.cut_until, self.kernel.now)
        self._release()

    def carry(self, when: float, deliver: Callable[[], object]) -> None:
        """Deliver at a time; what meets a cut on its way waits for its end."""

        def arrive() -> None:
            if self.cut:
                self._held.append(arrive)
            else:
                deliver()

        self.kernel.at(when, arrive)

    def arrival(self) -> float:
        """Return when a message arrives that is sent now."""
        seconds = self.draw.random() * self.weather.delay
        if self.weather.tail and self.draw.random() < 0.05:
            seconds += self.draw.random() * self.weather.tail
            self.faults["delayed"] += 1
        return self.kernel.now + seconds

    def _release(self) -> None:
        if not self.cut:
            held, self._held = self._held, []
            for each in held:
                each()

    def happens(self, chance: float, what: str) -> bool:
        if chance and self.draw.random() < chance:
            self.faults[what] += 1
            return True
        return False


class Stream:
    """One Exchange call. The two ends are told apart by who calls: worker_* and server_*."""

    def __init__(self, link: Link, session_id: int) -> None:
        self.link, self.session_id = link, session_id
        self.inbox: deque[Any] = deque()
        self.worker_open = self.server_open = True
        self.on_arrival: Callable[[], None] = lambda: None  # at the worker
        self.on_message: Callable[[bytes], None] = lambda _: None  # at the server
        self.on_closed: Callable[[], None] = lambda: None  # at the server
        self.reader_paused: Callable[[], bool] = lambda: False
        self._up_lost = self._down_lost = False
        self._up_first = self._up_last = self._down_last = 0.0
        self._outbox: deque[bytes] = deque()
        self._in_flight = 0
        self._writing = False

    # The worker's end

    def worker_open_it(self, arrive: Callable[[], None]) -> None:
        """Open the call at the server; nothing arrives before it."""
        self._up(arrive)
        self._up_first = self._up_last = max(self._up_last, self.link.kernel.now)

    def worker_send(self, message: bytes) -> None:
        if self.worker_open and not self.link.happens(self.link.weather.swallow, "message swallowed"):
            message = self._on_the_way(message)
            self._up(lambda: self.on_message(message))
            if self.link.happens(self.link.weather.repeat, "message doubled"):
                self._up(lambda: self.on_message(message))

    def worker_close(self, *, silently: bool = False) -> None:
        """Cancel the call, or die with it; a machine that goes down says nothing."""
        if not self.worker_open:
            return
        self.worker_open = False
        if silently:
            self._up_lost = True
            self.link.kernel.after(self._within(SERVER_KEEPALIVE), self.server_lost)
        else:
            self.link.carry(self.link.arrival(), self.server_lost)

    def worker_lost(self, details: str = "the connection was lost") -> None:
        """The worker's transport notices that the connection is gone."""
        if self.worker_open:
            self.worker_open = False
            self._arrive(Failure("UNAVAILABLE", details))
            self.link.carry(self.link.arrival(), self.server_lost)  # its reset, if it comes through

    # The server's end

    def server_reply(self, reply: bytes) -> bool:
        """Put a reply into the outbox; return whether there was room."""
        if len(self._outbox) >= _OUTBOX:
            return False
        self._outbox.append(reply)
        self._write_soon()
        return True

    def server_close(self, failure: Failure) -> None:
        """End the stream with a status; what was not written goes unsent."""
        if self.server_open:
            self.server_open = False
            self._outbox.clear()
            self._down(lambda: self._ended(failure))

    def server_lost(self) -> None:
        if self.server_open:
            self.server_open = False
            self.link.carry(self.link.arrival(), self.worker_lost)
            self.on_closed()

    # Faults

    def die(self) -> None:
        """The server's process is gone, and the stream with it."""
        self.server_open = False
        self._down_lost = True

    def break_(self, worker_after: float, server_after: float, *, up: bool, down: bool) -> None:
        """Lose what is under way and comes later, upwards, downwards or both; the ends notice when they do."""
        self._up_lost, self._down_lost = self._up_lost or up, self._down_lost or down
        self.link.kernel.after(worker_after, self.worker_lost)
        self.link.kernel.after(server_after, self.server_lost)

    def _within(self, seconds: float) -> float:
        return seconds * (0.75 + 0.25 * self.link.draw.random())

    def _up(self, deliver: Callable[[], None]) -> None:
        arrives = self.link.arrival()
        if self._up_first and self.link.happens(self.link.weather.overtake, "message overtook"):
            arrives = max(self._up_first, arrives)
        else:
            arrives = self._up_last = max(self._up_last, arrives)

        def arrive() -> None:
            if self.server_open and not self._up_lost:
                deliver()

        self.link.carry(arrives, arrive)

    def _down(self, deliver: Callable[[], None]) -> None:
        arrives = self.link.arrival()
        if not self.link.happens(self.link.weather.overtake, "message overtook"):
            arrives = self._down_last = max(self._down_last, arrives)

        def arrive() -> None:
            if self.worker_open and not self._down_lost:
                deliver()

        self.link.carry(arrives, arrive)

    def _on_the_way(self, message: bytes) -> bytes:
        if not self.link.happens(self.link.weather.damage, "message damaged"):
            return message
        damaged = bytearray(message)
        damaged[self.link.draw.randrange(len(damaged))] ^= 1 << self.link.draw.randrange(8)
        return bytes(damaged)

    def _write_soon(self) -> None:
        if not self._writing:
            self._writing = True
            self.link.kernel.after(self.link.draw.random() * 0.001, self._write)

    def _write(self) -> None:
        self._writing = False
        while self._outbox and self._in_flight < _WINDOW:
            reply = self._outbox.popleft()
            if self.link.happens(self.link.weather.swallow, "message swallowed"):
                continue
            reply = self._on_the_way(reply)
            self._in_flight += 1
            self._down(lambda reply=reply: self._arrive(reply))
            if self.link.happens(self.link.weather.repeat, "message doubled"):
                self._in_flight += 1
                self._down(lambda reply=reply: self._arrive(reply))

    def _arrive(self, item: Any) -> None:
        self.inbox.append(item)
        self.on_arrival()

    def read(self) -> Any:
        """Return the next message at the worker; the window opens again by one."""
        item = self.inbox.popleft()
        if not isinstance(item, Failure):
            self._in_flight -= 1
            self._write_soon()
        return item

    def _ended(self, failure: Failure) -> None:
        self.worker_open = False
        self._arrive(failure)
