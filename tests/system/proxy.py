"""A TCP proxy whose link can be made bad while it runs: slow, narrow, cut, silent, refusing, or damaging.

It carries bytes and knows nothing of what they say, so its faults fall wherever they fall: in the middle of a message,
of a header, of a handshake. It runs in a thread of its own; the attributes of :class:`Link` may be set at any time and
hold for the bytes that arrive from then on.

Loss. A TCP stream loses no bytes: a lost segment is sent again after a time-out, and all that came behind it waits for
it. So `loss` is a share of segments that stall the direction for `stall_seconds`, which is what a program sees of it;
what it does to the congestion window is not modelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar

__all__ = ["Link", "Proxy", "proxied"]

_T = TypeVar("_T")
Cut: TypeAlias = Literal["reset", "end"]

_CHUNK = 16 * 1024
_SEGMENT = 1448
_WAITING_CHUNKS = 512
_POLL_SECONDS = 0.01


@dataclass
class Link:
    """One direction of all connections: "up" is from those who connect to the server, "down" is back.

    Attributes:
        delay: seconds that every byte takes longer; bytes in flight do not wait for one another.
        rate: bytes per second, of each connection; None for no limit.
        loss: the share of segments that stall the connection.
        stall_seconds: how long such a stall is.
        hold: keep bytes back until this is over, as a network that is cut in two and mended before anybody gives up.
        swallow: take bytes and never hand them on, as a machine that vanished; the connection is of no use after it.
        corrupt_every: flip one bit in about every so many bytes; None for none.
        cut_after: cut a connection once it has carried about so many bytes in this direction; None for never.
        carried: the bytes handed on so far.
        damaged: the bits flipped so far.
        stalls: the stalls so far.
    """

    delay: float = 0.0
    rate: float | None = None
    loss: float = 0.0
    stall_seconds: float = 0.2
    hold: bool = False
    swallow: bool = False
    corrupt_every: float | None = None
    cut_after: float | None = None
    carried: int = 0
    damaged: int = 0
    stalls: int = 0


@dataclass(eq=False)
class _Connection:
    client: asyncio.StreamWriter
    server: asyncio.StreamWriter | None = None
    tasks: list[asyncio.Task[None]] = field(default_factory=list[asyncio.Task[None]])


class Proxy:
    """Takes connections on a port of its own and carries them to another.

    Args:
        upstream: the "HOST:PORT" to carry to; may be set anew, for the connections to come.
        seed: of where faults by chance fall.

    Attributes:
        address: where to connect.
        up: the direction to the server.
        down: the direction from it.
        cut_as: how `cut_after` cuts.
        cuts: the connections cut so far.
        accepted: the connections taken so far.
    """

    def __init__(self, upstream: str, seed: int = 0) -> None:
        self.upstream = upstream
        self.up = Link()
        self.down = Link()
        self.cut_as: Cut = "reset"
        self.cuts = 0
        self.accepted = 0
        self._random = random.Random(seed)
        self._connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None
        self._port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._on_loop(self._listen)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    @property
    def connections(self) -> int:
        """The connections that stand."""
        return len(self._connections)

    def cut(self, how: Cut = "reset") -> int:
        """Cut every connection now; return how many."""

        async def cut() -> int:
            connections = list(self._connections)
            for connection in connections:
                self._cut(connection, how)
            return len(connections)

        return self._on_loop(cut)

    def refuse(self) -> None:
        """Refuse new connections, as a machine on which nothing listens; those that stand are left alone."""

        async def refuse() -> None:
            if self._server is not None:
                self._server.close()
                self._server = None

        self._on_loop(refuse)

    def accept(self) -> None:
        """Take connections again, on the same port."""
        self._on_loop(self._listen)

    def close(self) -> None:
        """Cut everything and end the thread."""

        async def close() -> None:
            if self._server is not None:
                self._server.close()
            for connection in list(self._connections):
                self._cut(connection, "reset")
            others = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.gather(*others, return_exceptions=True)

        self._on_loop(close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _on_loop(self, work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        return asyncio.run_coroutine_threadsafe(work(), self._loop).result(10)

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._carry, "127.0.0.1", self._port, limit=_CHUNK)
            self._port = self._server.sockets[0].getsockname()[1]

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(writer)
        self._connections.add(connection)
        self.accepted += 1
        try:
            host, _, port = self.upstream.rpartition(":")
            try:
                back, connection.server = await asyncio.open_connection(host, int(port), limit=_CHUNK)
            except OSError:
                self._cut(connection, "reset", counted=False)
                return
            for each in (writer, connection.server):
                each.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            loop = asyncio.get_running_loop()
            connection.tasks = [
                loop.create_task(self._pump(connection, reader, connection.server, self.up)),
                loop.create_task(self._pump(connection, back, writer, self.down)),
            ]
            await asyncio.wait(connection.tasks)
        finally:
            self._connections.discard(connection)
            for each in (writer, connection.server):
                if each is not None:
                    each.close()

    async def _pump(
        self, connection: _Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, link: Link
    ) -> None:
        """Carry one direction of one connection to its end."""
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_WAITING_CHUNKS)
        loop = asyncio.get_running_loop()

        async def read() -> None:
            chunk = b"?"
            while chunk:
                try:
                    chunk = await reader.read(_CHUNK)
                except OSError:
                    if not link.swallow:
                        raise
                    chunk = b""
                if not chunk and link.swallow:
                    await asyncio.Event().wait()  # a silent link does not tell that the other side has gone either
                await waiting.put((loop.time() + link.delay, chunk))

        async def write() -> None:
            left = self._drawn(link.cut_after)
            damage_in = self._drawn(link.corrupt_every)
            while True:
                due, chunk = await waiting.get()
                if not chunk:
                    with contextlib.suppress(OSError):
                        writer.write_eof()
                    return
                stall = self._stall(link, len(chunk))
                await asyncio.sleep(max(due - loop.time(), 0) + stall)
                while link.hold and not link.swallow:  # noqa: ASYNC110 - it is set from another thread
                    await asyncio.sleep(_POLL_SECONDS)
                if link.swallow:
                    continue
                if link.corrupt_every is None:
                    damage_in = None
                elif damage_in is None:
                    damage_in = self._drawn(link.corrupt_every)
                if damage_in is not None:
                    chunk, damage_in = self._damage(link, chunk, damage_in)
                if left is None or link.cut_after is None:
                    left = self._drawn(link.cut_after)
                if left is not None and left <= len(chunk):
                    writer.write(chunk[:left])
                    link.carried += left
                    self._cut(connection, self.cut_as)
                    return
                left = None if left is None else left - len(chunk)
                writer.write(chunk)
                link.carried += len(chunk)
                await writer.drain()
                if link.rate is not None:
                    await asyncio.sleep(len(chunk) / link.rate)

        parts = [loop.create_task(read()), loop.create_task(write())]
        try:
            await asyncio.gather(*parts)
        except OSError:
            self._cut(connection, "reset", counted=False)
        finally:
            for part in parts:
                part.cancel()

    def _stall(self, link: Link, size: int) -> float:
        segments = math.ceil(size / _SEGMENT)
        if link.loss and self._random.random() < 1 - (1 - link.loss) ** segments:
            link.stalls += 1
            return link.stall_seconds
        return 0.0

    def _damage(self, link: Link, chunk: bytes, damage_in: int) -> tuple[bytes, int]:
        damaged = bytearray(chunk)
        while damage_in < len(damaged):
            damaged[damage_in] ^= 1 << self._random.randrange(8)
            link.damaged += 1
            damage_in += self._drawn(link.corrupt_every) or len(damaged)
        return bytes(damaged), damage_in - len(damaged)

    def _drawn(self, mean: float | None) -> int | None:
        """Return a number of bytes of about `mean`, at least 1."""
        return None if mean is None else max(1, round(mean * self._random.uniform(0.5, 1.5)))

    def _cut(self, connection: _Connection, how: Cut, *, counted: bool = True) -> None:
        if connection not in self._connections:
            return
        self._connections.discard(connection)
        self.cuts += counted
        for writer in (connection.client, connection.server):
            if writer is None:
                continue
            if how == "reset":
                with contextlib.suppress(OSError):
                    linger = struct.pack("ii", 1, 0)
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.transport.abort()
            else:
                writer.close()
        for task in connection.tasks:
            task.cancel()


@contextlib.contextmanager
def proxied(upstream: str, seed: int = 0) -> Iterator[Proxy]:
    """Run a proxy for as long as the block."""
    proxy = Proxy(upstream, seed)
    try:
        yield proxy
    finally:
        proxy.close()
