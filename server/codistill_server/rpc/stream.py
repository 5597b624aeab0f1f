"""A session's stream: contributions in, replies out, everything bounded, and a status at its end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

import grpc

from codistill.v1 import distillation_pb2 as pb
from codistill.wire.channel import SESSION_KEY
from codistill.wire.checksum import parse_session, verify_checksum
from codistill_server.coordinator import Coordinator
from codistill_server.errors import RequestRejected
from codistill_server.rounds.actions import Status
from codistill_server.rpc.quotas import QuotaExceeded, RepeatQuota
from codistill_server.rpc.requests import DAMAGED, parse
from codistill_server.rpc.status import GOING_DOWN, Context, abort

__all__ = ["SessionStream", "session_of"]

_UNREAD_REPLIES = 64
_STATUS_SECONDS = 5.0


def session_of(context: Context) -> int:
    """Return the session that a stream's metadata name.

    Raises:
        RequestRejected: they name none, or it was damaged on the way.
    """
    value = dict(context.invocation_metadata() or ()).get(SESSION_KEY, "")
    session_id = parse_session(str(value))
    if session_id is None:
        raise RequestRejected(
            Status.ABORTED,
            f"metadata {SESSION_KEY}: {str(value)[:80]!r} is no session, or was damaged on the way; join again, and send the "
            "session in decimal, a hyphen and the CRC-32C of the decimal in hexadecimal",
        )
    return session_id


class SessionStream:
    """The stream of one session; the coordinator's :class:`codistill_server.coordinator.Outbox` for it.

    Args:
        session_id: the session.
        coordinator: the run.
        repeats: how often the session may repeat a contribution.
        on_failure: called with the error when the run cannot go on.
    """

    def __init__(
        self, session_id: int, coordinator: Coordinator, repeats: RepeatQuota, on_failure: Callable[[Exception], None]
    ) -> None:
        self._session_id = session_id
        self._coordinator = coordinator
        self._repeats = repeats
        self._on_failure = on_failure
        self._replies: asyncio.Queue[bytes] = asyncio.Queue(_UNREAD_REPLIES)
        self._ended: asyncio.Future[RequestRejected | QuotaExceeded] = asyncio.get_running_loop().create_future()
        # gRPC takes no status while a message or the headers are being written, cancelled or not: a worker that is rejected
        # at that moment would not learn why. So writing, and ending the stream, need this lock.
        self._operation = asyncio.Lock()

    def reply(self, reply: bytes) -> None:
        """Queue a reply; a worker that leaves too many unread is rejected."""
        try:
            self._replies.put_nowait(reply)
        except asyncio.QueueFull:
            self.end(Status.ABORTED, f"{_UNREAD_REPLIES} replies lie unread; read them, or join again")

    def end(self, status: Status, message: str) -> None:
        """End the stream with a status; the first one counts."""
        self._reject(RequestRejected(status, message))

    async def serve(self, requests: AsyncIterator[bytes], context: Context, going_down: asyncio.Event) -> None:
        """Read contributions and write replies until the stream ends; then close its session and send its status.

        Args:
            requests: the serialised contributions.
            context: the call.
            going_down: set when the server ends all streams.
        """
        writing = asyncio.ensure_future(self._write(context))
        others = [asyncio.ensure_future(self._read(requests)), asyncio.ensure_future(going_down.wait())]
        try:
            try:
                await asyncio.wait([writing, *others, self._ended], return_when=asyncio.FIRST_COMPLETED)
            finally:
                # Before the status is sent: a worker that does not read holds that up, and the others need not wait.
                self._coordinator.close_stream(self._session_id, self)
                for task in others:
                    task.cancel()
                await asyncio.wait(others)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STATUS_SECONDS), self._operation:
                    if self._ended.done():
                        await abort(context, self._ended.result())
                    if going_down.is_set():
                        await context.abort(grpc.StatusCode.UNAVAILABLE, GOING_DOWN)
        finally:
            writing.cancel()
            await asyncio.wait([writing])

    async def _write(self, context: Context) -> None:
        # Headers go out at once: they tell the worker that its session's stream stands.
        async with self._operation:
            await context.send_initial_metadata(())
        while True:
            reply = await self._replies.get()
            async with self._operation:
                await context.write(reply)

    async def _read(self, requests: AsyncIterator[bytes]) -> None:
        async for raw in requests:
            try:
                self._contribute(raw)
            except (RequestRejected, QuotaExceeded) as rejected:
                self._reject(rejected)
                return
            except Exception as error:  # noqa: BLE001 - the open round may be half decided; the run cannot go on
                self._on_failure(error)
                return

    def _contribute(self, raw: bytes) -> None:
        if not verify_checksum(raw, str(self._session_id)):
            message = f"a contribution of {len(raw)} bytes {DAMAGED}; join again"
            self._coordinator.reject_damaged(self._session_id, message)
            raise RequestRejected(Status.ABORTED, message)
        contribution = parse(pb.ExchangeRequest, raw)
        self._repeats.contribute(contribution.round, time.monotonic())
        self._coordinator.contribute(self._session_id, contribution, len(raw))

    def _reject(self, rejected: RequestRejected | QuotaExceeded) -> None:
        if not self._ended.done():
            self._ended.set_result(rejected)
