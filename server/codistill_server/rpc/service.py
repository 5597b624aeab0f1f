"""The rpcs of the protocol on a coordinator.

The event loop's thread is the coordinator's thread, so there are no locks. Replies are serialised once, by the coordinator,
and the same bytes go to every participant that shares them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from codistill.v1 import distillation_pb2 as pb
from codistill.wire.checksum import append_checksum
from codistill.wire.times import is_valid, seconds
from codistill_server.coordinator import Coordinator
from codistill_server.errors import RequestRejected
from codistill_server.rounds.actions import Status
from codistill_server.rpc.quotas import Limits, QuotaExceeded, Quotas
from codistill_server.rpc.requests import DamagedRequest, has_checksum_field, parse, parse_undamaged
from codistill_server.rpc.status import GOING_DOWN, Context, abort
from codistill_server.rpc.stream import SessionStream, session_of

__all__ = ["SERVICE", "DistillationService"]

_Request = TypeVar("_Request", bound=Message)

SERVICE = pb.DESCRIPTOR.services_by_name["DistillationService"].full_name
_STREAM_GRACE = 30.0
_TICK_SECONDS = 0.25
_WATCH_SECONDS = 1.0


class DistillationService:
    """The rpcs of ``codistill.v1.DistillationService`` on a coordinator.

    Args:
        coordinator: the run.
        on_failure: called with the error when the run cannot go on.
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
        self._quotas = Quotas(limits or Limits())
        self._going_down = asyncio.Event()

    def handler(self) -> grpc.GenericRpcHandler:
        """Return the handler to add to a gRPC server."""
        coordinator = self._coordinator

        def report(request: pb.ReportRequest) -> pb.ReportResponse:
            coordinator.report(request)
            return pb.ReportResponse()

        def leave(request: pb.LeaveRequest) -> pb.LeaveResponse:
            coordinator.leave(request)
            return pb.LeaveResponse()

        def get_run(request: pb.GetRunRequest) -> pb.GetRunResponse:
            del request
            return pb.GetRunResponse(run=coordinator.snapshot())

        # Requests are parsed by the calls themselves, so that bytes that are no message get a status that says so;
        # the stream's replies come serialised.
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Join": self._unary(partial(parse_undamaged, pb.JoinRequest), self._join),
                "Report": self._unary(partial(parse_undamaged, pb.ReportRequest), report),
                "Leave": self._unary(partial(parse_undamaged, pb.LeaveRequest), leave),
                "GetRun": self._unary(partial(parse_undamaged, pb.GetRunRequest), get_run),
                "WatchRun": grpc.unary_stream_rpc_method_handler(
                    self._watch_run, None, pb.WatchRunResponse.SerializeToString
                ),
                "Exchange": grpc.stream_stream_rpc_method_handler(self._exchange, None, None),
            },
        )

    def end(self) -> None:
        """End every stream, as the server is going down."""
        self._going_down.set()

    async def tick(self) -> None:
        """Have the coordinator do what is due, until cancelled or until the run cannot go on."""
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            try:
                self._coordinator.tick()
            except Exception as error:  # noqa: BLE001 - a deadline closes rounds in here; without ticks none would again
                self._fail(error)
                return

    def _unary(
        self, read: Callable[[bytes], _Request], call: Callable[[_Request], Message]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        async def handle(raw: bytes, context: Context) -> bytes:
            try:
                self._quotas.call(_host_of(context), len(raw), time.monotonic())
                response = call(read(raw))
                return append_checksum(response) if has_checksum_field(type(response)) else response.SerializeToString()
            except (RequestRejected, QuotaExceeded) as rejected:
                await abort(context, rejected)
            except DamagedRequest as damaged:
                await context.abort(grpc.StatusCode.UNAVAILABLE, f"{damaged}; send it again")
            except Exception as error:  # noqa: BLE001 - a Leave may close a round, which may be half decided now
                self._fail(error)
                await context.abort(grpc.StatusCode.UNAVAILABLE, f"{GOING_DOWN}: {error}")

        return grpc.unary_unary_rpc_method_handler(handle, None, None)

    def _join(self, request: pb.JoinRequest) -> pb.JoinResponse:
        self._quotas.join(
            request.participant if request.participant in self._coordinator.states else "", time.monotonic()
        )
        response = self._coordinator.join(request)
        # A worker that dies between Join and Exchange has no stream whose end would tell.
        loop = asyncio.get_running_loop()
        loop.call_later(_STREAM_GRACE, self._coordinator.expect_stream, response.session_id)
        return response

    async def _watch_run(self, raw: bytes, context: Context) -> AsyncIterator[pb.WatchRunResponse]:
        try:
            request = parse(pb.WatchRunRequest, raw)
            interval = seconds(request.interval) if request.HasField("interval") else _WATCH_SECONDS
            if not (is_valid(request.interval) and 0.1 <= interval <= 60):
                message = f"interval: {interval} s is not allowed; allowed: 0.1 s to 60 s"
                raise RequestRejected(Status.INVALID_ARGUMENT, message)
            self._quotas.watch()
        except (RequestRejected, QuotaExceeded) as rejected:
            await abort(context, rejected)
        try:
            while True:
                run = self._coordinator.snapshot()
                yield pb.WatchRunResponse(run=run)
                if run.complete or self._going_down.is_set():
                    return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._going_down.wait(), interval)
        finally:
            self._quotas.watching -= 1

    async def _exchange(self, requests: AsyncIterator[bytes], context: Context) -> None:
        try:
            session_id = session_of(context)
            repeats = self._quotas.repeats(time.monotonic())
            stream = SessionStream(session_id, self._coordinator, repeats, self._fail)
            self._coordinator.open_stream(session_id, stream)
        except RequestRejected as rejected:
            await abort(context, rejected)
        self.streams += 1
        try:
            await stream.serve(requests, context, self._going_down)
        finally:
            self.streams -= 1

    def _fail(self, error: Exception) -> None:
        self._on_failure(error)
        self.end()


def _host_of(context: Context) -> str:
    """Return the peer without its port, which is another one with each connection."""
    return context.peer().rpartition(":")[0]
