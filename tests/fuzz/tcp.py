"""Attacks below gRPC: what a scanner, a broken proxy or somebody hostile sends to the port itself.

What may unpack to headers with a path that is not UTF-8, such as any garbage after a preface, is left out: it ends the server
process (``docs/security.md``).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections import deque
from collections.abc import Sequence

from fuzz.endpoints import Endpoint
from fuzz.generators import noise

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = struct.pack(">I", 0)[1:] + b"\x04\x00" + bytes(4)
_HANDSHAKES = (
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /codistill.v1.DistillationService/Join HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
    bytes.fromhex("160301020001 0001fc0303") + bytes(64),
    b"SSH-2.0-x\r\n",
    b"\x00" * 64,
    b"\xff" * 64,
)
_PATHS = ("Join", "Exchange", "Report", "Leave", "GetRun", "WatchRun", "Nothing", "")


def frame(kind: int, flags: int, stream: int, payload: bytes, length: int | None = None) -> bytes:
    """Return an HTTP/2 frame; `length` lies about its length."""
    size = len(payload) if length is None else length
    return (
        struct.pack(">I", size & 0xFFFFFF)[1:] + bytes([kind & 255, flags & 255]) + struct.pack(">I", stream) + payload
    )


def headers(stream: int, path: str, extra: Sequence[tuple[bytes, bytes]] = (), flags: int = 4) -> bytes:
    """Return the HEADERS frame of a gRPC call, every field a literal."""
    fields = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", f"/codistill.v1.DistillationService/{path}".encode()),
        (b":authority", b"x"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        *extra,
    ]
    block = b"".join(b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in fields)
    return frame(1, flags, stream, block)


class Port:
    """One attack per call of :meth:`attack`; what is left open is bounded, the oldest is closed first.

    Args:
        endpoint: the server.
        leave_open: how many connections at most stay open when an attack leaves one.
    """

    def __init__(self, endpoint: Endpoint, leave_open: int = 40) -> None:
        self._endpoint = endpoint
        self._left: deque[asyncio.StreamWriter] = deque()
        self._most = leave_open

    async def attack(self, rng: random.Random) -> str:
        """Send one thing that is no call of a client, and return its name."""
        name, parts, pause = _draw(rng, self._endpoint.metadata)
        reader, writer = await asyncio.open_connection("127.0.0.1", self._endpoint.port)
        try:
            with contextlib.suppress(OSError):
                for part in parts:
                    writer.write(part)
                    await writer.drain()
                    if pause:
                        await asyncio.sleep(pause)
                if rng.random() < 0.3:
                    writer.write_eof()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(rng.choice((0.0, 0.01, 0.05))):
                        while await reader.read(65536):
                            pass
        except BaseException:
            writer.transport.abort()
            raise
        if rng.random() < 0.1:
            self._left.append(writer)
            if len(self._left) > self._most:
                self._close_oldest()
        elif rng.random() < 0.5:
            with contextlib.suppress(OSError):  # the server may have closed it first
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        else:
            writer.close()
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(1):
                    await writer.wait_closed()
            writer.transport.abort()  # what the server does not read would keep it open
        return name

    def close(self) -> None:
        while self._left:
            self._close_oldest()

    def _close_oldest(self) -> None:
        writer = self._left.popleft()  # by a name: dropped before it is closed, it would warn of that
        writer.transport.abort()


def _draw(rng: random.Random, metadata: Sequence[tuple[str, str]]) -> tuple[str, Sequence[bytes], float]:
    begin = PREFACE + SETTINGS
    path = rng.choice(_PATHS)
    extra = [(key.encode(), value.encode()) for key, value in metadata] if rng.random() < 0.5 else []
    match rng.randrange(11):
        case 0:
            return "garbage", [noise(rng, 2000)], 0
        case 1:
            return "another protocol", [rng.choice(_HANDSHAKES) + noise(rng, 100)], 0
        case 2:
            return "half a preface", [PREFACE[: rng.randrange(len(PREFACE))]], 0
        case 3:
            size = rng.choice((2**32 - 1, 2**31, 2**24, 70_000))
            lie = b"\x00" + struct.pack(">I", size) + noise(rng, 99)
            call = headers(1, path, extra) + frame(0, rng.choice((0, 1)), 1, lie)
            return "huge message length", [begin, call], 0
        case 4:
            lie = bytes([rng.choice((1, 2, 255)), 0, 0, 0, 4]) + b"abcd"
            return "compressed flag without compression", [begin, headers(1, path, extra), frame(0, 1, 1, lie)], 0
        case 5:
            slow = begin + headers(1, path, extra)
            return "slow writer", [slow[at : at + 8] for at in range(0, rng.randrange(40, len(slow)), 8)], 0.003
        case 6:
            return "nothing at all", [], 0
        case 7:
            reset = b"".join(headers(each, path, extra) + frame(3, 0, each, bytes(4)) for each in range(1, 101, 2))
            return "opened and reset", [begin, reset], 0
        case 8:
            pings = frame(6, 0, 0, bytes(8)) * rng.choice((1, 50, 500))
            return (
                "flood of pings and settings",
                [begin, pings, SETTINGS * 100, frame(8, 0, 0, b"\x7f\xff\xff\xff") * 3],
                0,
            )
        case 9:
            kinds = [each for each in range(12) if each not in (1, 5, 9)]
            junk = [frame(rng.choice(kinds), rng.randrange(256), rng.getrandbits(32), noise(rng, 60)) for _ in range(9)]
            return "random frames", [begin, *junk], 0
        case _:
            lie = frame(rng.choice((0, 2, 3, 4, 6, 7, 8)), 4, 1, noise(rng, 60), rng.getrandbits(24))
            return "lying frame length", [begin, headers(1, path, extra), lie], 0
