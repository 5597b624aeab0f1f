"""The coordinator on gRPC: one event loop, one stream per session, everything bounded.

The loop's thread is the coordinator's thread, so there are no locks. Replies are serialised once, by the coordinator,
and the same bytes go to every student that shares them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, TypeAlias, TypeVar

import grpc
import grpc.aio
import torch
from google.protobuf.message import DecodeError, Message

from codistill.v1 import distillation_pb2 as pb
from codistill.wire.channel import PUSHBACK_KEY, SESSION_KEY, SUPERSEDED_KEY
from codistill.wire.checksum import append_checksum, has_checksum, parse_session, verify_checksum
from codistill_server.coordinator import Coordinator
from codistill_server.errors import RequestRejected
from codistill_server.ratelimit import Limits, QuotaExceeded, Quotas
from codistill_server.rounds.events import Status

__all__ = ["DistillationService", "EventLoopSubmit", "ReadableRequests"]

_T = TypeVar("_T")
_Request = TypeVar("_Request", bound=Message)
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_OUTBOX_REPLIES = 64
_STREAM_GRACE = 30.0
_STATUS_SECONDS = 5.0
_TICK = 0.25
_DAMAGED = "was damaged on the way: its checksum is missing or wrong"
_GOING_DOWN = "the server is going down; try again until it is back"
_CODES = {
    Status.ABORTED: grpc.StatusCode.ABORTED,
    Status.SUPERSEDED: grpc.StatusCode.ABORTED,
    Status.FAILED_PRECONDITION: grpc.StatusCode.FAILED_PRECONDITION,
    Status.INVALID_ARGUMENT: grpc.StatusCode.INVALID_ARGUMENT,
}


class _Damaged(Exception):  # noqa: N818 - the network's fault, and mended by sending again
    """A message is not what was sent."""


class _Stream:
    """A session's outbox: a bounded queue between the coordinator and one stream's writer."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[bytes] = asyncio.Queue(_OUTBOX_REPLIES)
        self.ended: asyncio.Future[RequestRejected | QuotaExceeded] = asyncio.get_running_loop().create_future()
        # gRPC takes no status while something is being written, headers too, cancelled or not: a worker that is refused at
        # that moment would not be told why. So whoever writes, or ends the stream, holds this.
        self.operation = asyncio.Lock()

    def reply(self, reply: bytes) -> None:
        try:
            self.queue.put_nowait(reply)
        except asyncio.QueueFull:
            self.end(Status.ABORTED, f"{_OUTBOX_REPLIES} replies lie unread; read them, or join again")

    def end(self, status: Status, message: str) -> None:
        self.refuse(RequestRejected(status, message))

    def refuse(self, refused: RequestRejected | QuotaExceeded) -> None:
        if not self.ended.done():
            self.ended.set_result(refused)


class DistillationService:
    """The rpcs of ``codistill.v1.Distillation`` on a coordinator.

    Args:
        coordinator: the run.
        on_failure: called with the error, when the run cannot go on.
        limits: how much one peer may ask for.

    Attributes:
        streams: how many streams of sessions are open.
    """

    def __init__(
        self, coordinator: Coordinator, on_failure: Callable[[Exception], None], limits: Limits | None = None
    ) -> None:
        self._coordinator = coordinator
        self._on_failure = on_failure
        self.streams = 0
        self._gate = Quotas(limits or Limits())
        self._ending = asyncio.Event()

    def handler(self) -> grpc.GenericRpcHandler:
        """Returns what a gRPC server registers."""
        coordinator = self._coordinator

        def report(request: pb.ReportRequest) -> pb.ReportResponse:
            coordinator.report(request)
            return pb.ReportResponse()

        def leave(request: pb.LeaveRequest) -> pb.LeaveResponse:
            coordinator.leave(request)
            return pb.LeaveResponse()

        def get_run(request: pb.GetRunRequest) -> pb.Run:
            del request
            return coordinator.snapshot()

        # Requests are parsed by the calls themselves, so that bytes that are no message get a status that says so;
        # the stream's replies come serialised.
        return grpc.method_handlers_generic_handler(
            pb.DESCRIPTOR.services_by_name["Distillation"].full_name,
            {
                "Join": self._unary(pb.JoinRequest, self._join),
                "Report": self._unary(pb.ReportRequest, report),
                "Leave": self._unary(pb.LeaveRequest, leave),
                "GetRun": self._unary(pb.GetRunRequest, get_run),
                "WatchRun": grpc.unary_stream_rpc_method_handler(self._watch_run, None, pb.Run.SerializeToString),
                "Exchange": grpc.stream_stream_rpc_method_handler(self._exchange, None, None),
            },
        )

    def end(self) -> None:
        """Ends every stream: the server is going down."""
        self._ending.set()

    async def tick(self) -> None:
        """Lets the coordinator's time go by, until cancelled or until the run cannot go on."""
        while True:
            await asyncio.sleep(_TICK)
            try:
                self._coordinator.tick()
            except Exception as error:  # noqa: BLE001 - a deadline closes rounds in here; without ticks none would again
                self._fail(error)
                return

    def _unary(
        self, request_type: type[_Request], call: Callable[[_Request], Message]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        async def handle(raw: bytes, context: _Context) -> bytes:
            try:
                self._gate.call(_host_of(context), len(raw), time.monotonic())
                response = call(_parse_whole(request_type, raw))
                return (
                    append_checksum(response) if _has_checksum_field(type(response)) else response.SerializeToString()
                )
            except (RequestRejected, QuotaExceeded) as refused:
                await _abort(context, refused)
            except _Damaged as damaged:
                await context.abort(grpc.StatusCode.UNAVAILABLE, f"{damaged}; send it again")
            except Exception as error:  # noqa: BLE001 - a goodbye may close a round, which may be half decided now
                self._fail(error)
                await context.abort(grpc.StatusCode.UNAVAILABLE, f"{_GOING_DOWN}: {error}")

        return grpc.unary_unary_rpc_method_handler(handle, None, None)

    def _join(self, request: pb.JoinRequest) -> pb.JoinResponse:
        self._gate.join(request.student if request.student in self._coordinator.presence else "", time.monotonic())
        response = self._coordinator.join(request)
        # A worker that dies between Join and Exchange has no stream whose end would tell.
        loop = asyncio.get_running_loop()
        loop.call_later(_STREAM_GRACE, self._coordinator.expect_stream, response.session)
        return response

    async def _watch_run(self, raw: bytes, context: _Context) -> AsyncIterator[pb.Run]:
        try:
            interval = _parse(pb.WatchRunRequest, raw).interval_seconds or 1.0
            if not 0.1 <= interval <= 60:
                message = f"interval_seconds: {interval} is not allowed; allowed: 0.1 to 60, or 0 for 1"
                raise RequestRejected(Status.INVALID_ARGUMENT, message)
            self._gate.watch()
        except (RequestRejected, QuotaExceeded) as refused:
            await _abort(context, refused)
        try:
            while True:
                run = self._coordinator.snapshot()
                yield run
                if run.complete or self._ending.is_set():
                    return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._ending.wait(), interval)
        finally:
            self._gate.watching -= 1

    async def _exchange(self, requests: AsyncIterator[bytes], context: _Context) -> None:
        stream = _Stream()
        try:
            session = _session_of(context)
            self._coordinator.open_stream(session, stream)
        except RequestRejected as refused:
            await _abort(context, refused)
        self.streams += 1
        writing = asyncio.ensure_future(_write(stream, context))
        others = [
            asyncio.ensure_future(self._read(session, requests, stream)),
            asyncio.ensure_future(self._ending.wait()),
        ]
        try:
            try:
                await asyncio.wait([writing, *others, stream.ended], return_when=asyncio.FIRST_COMPLETED)
            finally:
                # Before the status is sent: a worker that does not read holds that up, and the others need not wait.
                self._coordinator.close_stream(session, stream)
                for part in others:
                    part.cancel()
                await asyncio.wait(others)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STATUS_SECONDS), stream.operation:
                    if stream.ended.done():
                        await _abort(context, stream.ended.result())
                    if self._ending.is_set():
                        await context.abort(grpc.StatusCode.UNAVAILABLE, _GOING_DOWN)
        finally:
            self.streams -= 1
            writing.cancel()
            await asyncio.wait([writing])

    async def _read(self, session: int, requests: AsyncIterator[bytes], stream: _Stream) -> None:
        repeats = self._gate.session(time.monotonic())
        async for raw in requests:
            try:
                if not verify_checksum(raw, str(session)):
                    message = f"a contribution of {len(raw)} bytes {_DAMAGED}; join again"
                    self._coordinator.damaged(session, message)
                    raise RequestRejected(Status.ABORTED, message)
                contribution = _parse(pb.Contribution, raw)
                repeats.contribute(contribution.round, time.monotonic())
                self._coordinator.contribute(session, contribution, len(raw))
            except (RequestRejected, QuotaExceeded) as refused:
                stream.refuse(refused)
                return
            except Exception as error:  # noqa: BLE001 - the open round may be half decided; the run cannot go on
                self._fail(error)
                return

    def _fail(self, error: Exception) -> None:
        self._on_failure(error)
        self.end()


class EventLoopSubmit:
    """Runs heavy work on one thread beside the event loop, and light work at once."""

    def __init__(self, on_failure: Callable[[Exception], None]) -> None:
        self._on_failure = on_failure
        self._pool = ThreadPoolExecutor(1, "codistill-targets", initializer=torch.set_num_threads, initargs=(1,))
        self._tasks: set[asyncio.Task[None]] = set()

    def __call__(self, work: Callable[[], _T], done: Callable[[_T], None], *, heavy: bool) -> None:
        """See :class:`codistill_server.coordinator.Submit`."""
        if not heavy:
            done(work())
            return
        task = asyncio.get_running_loop().create_task(self._beside(work, done))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def close(self) -> None:
        """Ends the thread, after the work it is at."""
        self._pool.shutdown(cancel_futures=True)

    async def _beside(self, work: Callable[[], _T], done: Callable[[_T], None]) -> None:
        try:
            done(await asyncio.get_running_loop().run_in_executor(self._pool, work))
        except Exception as error:  # noqa: BLE001 - nobody awaits this task; whatever it is ends the run
            self._on_failure(error)


class ReadableRequests(grpc.aio.ServerInterceptor):
    """Refuses bytes that are no message also where gRPC's own services, health and reflection, would read them.

    They let the error out: that is UNKNOWN, and a traceback in the log for everyone who sends such bytes.
    """

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """Returns the call's handler, reading its requests itself if gRPC would."""
        handler = await continuation(handler_call_details)
        read = getattr(handler, "request_deserializer", None)
        if read is None:  # no such method, or one of ours
            return handler
        request_type: type[Message] = read.__self__

        async def readable(raw: bytes, context: _Context) -> Message:
            try:
                return _parse(request_type, raw)
            except RequestRejected as refused:
                await _abort(context, refused)

        async def unary(raw: bytes, context: _Context) -> Any:
            call = handler.unary_stream if handler.response_streaming else handler.unary_unary
            return await call(await readable(raw, context), context)

        async def stream(raws: AsyncIterator[bytes], context: _Context) -> AsyncIterator[Any]:
            async def requests() -> AsyncIterator[Message]:
                async for raw in raws:
                    yield await readable(raw, context)

            async for reply in handler.stream_stream(requests(), context):
                yield reply

        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(stream, None, handler.response_serializer)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(unary, None, handler.response_serializer)
        return grpc.unary_unary_rpc_method_handler(unary, None, handler.response_serializer)


def _parse(request_type: type[_Request], raw: bytes) -> _Request:
    try:
        return request_type.FromString(raw)
    except DecodeError as error:
        message = f"{len(raw)} bytes are not a {request_type.DESCRIPTOR.full_name}: {error}"
        raise RequestRejected(Status.INVALID_ARGUMENT, message) from error


def _parse_whole(request_type: type[_Request], raw: bytes) -> _Request:
    """Returns a message whose checksum, if it has one, is right.

    Raises:
        RequestRejected: the bytes are no such message.
        _Damaged: they are not those that were sealed.
    """
    if not _has_checksum_field(request_type):
        return _parse(request_type, raw)
    damaged = _Damaged(f"a {request_type.DESCRIPTOR.full_name} of {len(raw)} bytes {_DAMAGED}")
    try:
        message = _parse(request_type, raw)
    except RequestRejected:
        if has_checksum(raw) and not verify_checksum(raw):
            raise damaged from None
        raise
    if message.HasField("checksum") and not verify_checksum(raw):
        raise damaged
    return message


def _has_checksum_field(message_type: type[Message]) -> bool:
    return "checksum" in message_type.DESCRIPTOR.fields_by_name


def _session_of(context: _Context) -> int:
    value = dict(context.invocation_metadata() or ()).get(SESSION_KEY, "")
    session = parse_session(str(value))
    if session is None:
        raise RequestRejected(
            Status.ABORTED,
            f"metadata {SESSION_KEY}: {str(value)[:80]!r} is no session, or was damaged on the way; join again, and send the "
            "session in decimal, a hyphen and the CRC-32 of the decimal in hexadecimal",
        )
    return session


def _host_of(context: _Context) -> str:
    """Returns the peer without its port, which is another one with each connection."""
    return context.peer().rpartition(":")[0]


async def _write(stream: _Stream, context: _Context) -> None:
    # Headers go out at once: they tell the worker that its session's stream stands.
    async with stream.operation:
        await context.send_initial_metadata(())
    while True:
        reply = await stream.queue.get()
        async with stream.operation:
            await context.write(reply)


async def _abort(context: _Context, refused: RequestRejected | QuotaExceeded) -> NoReturn:
    if isinstance(refused, QuotaExceeded):
        pushback = ((PUSHBACK_KEY, str(max(round(1000 * refused.seconds), 1))),)
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(refused), pushback)
    trailing = ((SUPERSEDED_KEY, "1"),) if refused.status is Status.SUPERSEDED else ()
    await context.abort(_CODES[refused.status], str(refused), trailing)
