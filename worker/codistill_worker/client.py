"""The exchange over gRPC: one session, one stream, bounded waits, and reconnection.

A thread reads the stream into a queue, so that every wait for a reply has a limit and ends when the worker is told to
stop, without tearing down the session that it has yet to say goodbye on.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import grpc
from google.protobuf.message import DecodeError

from codistill import SESSION_KEY, SUPERSEDED_KEY
from codistill.checksums import is_whole, seal
from codistill.exit_codes import ExitCode
from codistill.v1 import distillation_pb2 as pb
from codistill_worker.errors import Interrupted, WorkerError

__all__ = ["GrpcExchange"]

_log = logging.getLogger(__name__)

_CALL_SECONDS = 20.0
_SLICE_SECONDS = 0.2
_FIRST_BACKOFF = 0.1
_LONGEST_BACKOFF = 5.0
_DAMAGED = "was damaged on the way: its checksum is missing or wrong"
_WENT_AWAY = "went away and did not come back"
_RETRIED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
# What gRPC itself makes of bytes that it cannot understand: a server of another kind, or damage on the way.
_STRANGE = (
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)
_STRANGE_ENDINGS = 5
_NAMELESS = (grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INTERNAL)

_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", -1),  # the server is trusted to send targets of any size
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Left alone, the channel would wait up to two minutes between two attempts, and fail every call meanwhile.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
]


class GrpcExchange:
    """A student's session with an aggregation server.

    Args:
        address: the server's "HOST:PORT".
        connect_timeout: seconds to reach a server never reached before.
        give_up_after: seconds to wait for one round's targets, or for a server that went away.
        silence_after: seconds without targets or a notice after which a stream is taken to have lost what was sent on it,
            although it stands; longer than the time between the server's notices.
        stop: set when the worker is asked to stop; ends every wait with :class:`Interrupted`.
    """

    def __init__(
        self,
        address: str,
        *,
        connect_timeout: float,
        give_up_after: float,
        silence_after: float = 20.0,
        stop: threading.Event,
    ) -> None:
        self._address = address
        self._connect_timeout = connect_timeout
        self._give_up_after = give_up_after
        self._silence_after = silence_after
        self._stop = stop
        self._channel = self._open_channel()
        self._stub = _Stub(self._channel)
        self._request: pb.JoinRequest | None = None
        self._session = 0
        self._stream: _Stream | None = None
        self._open: pb.Contribution | None = None
        self._next_round = 0
        self._strange = 0
        self._reports = _Reports()

    def join(self, request: pb.JoinRequest) -> pb.JoinResponse:
        """Opens the session and its stream.

        Raises:
            WorkerError: the server cannot be reached in time, or refuses; the text says why.
            Interrupted: the worker was asked to stop.
        """
        self._request = request
        return self._connect(self._connect_timeout, "cannot be reached")

    def send(self, contribution: pb.Contribution) -> None:
        """Publishes a round's outputs; does not wait."""
        self._open = contribution
        if self._stream is not None:
            self._stream.send(contribution)

    def receive(self, number: int) -> pb.Targets:
        """Returns the targets of a round, waiting for them; a broken connection is mended meanwhile.

        Raises:
            WorkerError: the wait outlasted `give_up_after`, the server stayed away, or it refused.
            Interrupted: the worker was asked to stop.
        """
        started = heard = time.monotonic()
        waiting: pb.Waiting | None = None
        backoff = 0.0
        while True:
            stream = self._stream
            try:
                if stream is None:
                    self._reconnect()
                    heard = time.monotonic()
                    continue
                reply = stream.receive(_SLICE_SECONDS)
                if reply is not None:
                    heard, self._strange = time.monotonic(), 0
                elif time.monotonic() - heard >= self._silence_after:
                    raise _Broken(f"nothing was heard of round {number} for {self._silence_after:g} s")
            except grpc.RpcError as error:
                self._check_stop()
                self._broken(error)
                left = started + self._give_up_after - time.monotonic()
                if left <= 0:
                    raise self._gave_up(number, waiting, time.monotonic() - started) from None
                # The first time at once; but a server that takes joins and breaks every stream needs a pause.
                self._pause(min(backoff, left))
                backoff = max(2 * backoff, _FIRST_BACKOFF)
                continue
            if reply is None or reply.HasField("waiting"):
                self._check_stop()
                if reply is not None:
                    waiting = reply.waiting
                    _log.info("round %d waits for %s, %.0f s", number, ", ".join(waiting.students), waiting.seconds)
                if time.monotonic() - started >= self._give_up_after:
                    raise self._gave_up(number, waiting, time.monotonic() - started)
            elif reply.targets.round == number:  # else a closed round was answered twice, around a reconnection
                self._open, self._next_round = None, number + 1
                return reply.targets

    def report(self, report: pb.ReportRequest) -> None:
        """Reports progress without waiting, one report under way at a time.

        A connection that is found broken is mended first, unless the worker was asked to stop: then the report is kept.

        Raises:
            WorkerError: the server stayed away, or refused.
            Interrupted: the worker was asked to stop while the connection was mended.
        """
        self._reports.add(report)
        self._next_round = max(self._next_round, report.round)
        if not self._connected:
            if self._stop.is_set():
                return
            self._mend()
        self._reports.send(self._session, lambda request: self._stub.report.future(request, timeout=_CALL_SECONDS))

    def leave(self, reason: pb.LeaveReason.ValueType, message: str) -> None:
        """Delivers what is left to report and ends the session.

        The others wait for a student until the server knows that it finished; so for that, a broken connection is mended.
        For any other reason the end of the connection tells the server enough.

        Raises:
            WorkerError: a student that finished could not say so: the server stayed away, refused, or has a newer worker.
            Interrupted: the worker was asked to stop before it could say so.
        """
        finished = reason == pb.LEAVE_REASON_FINISHED
        deadline = time.monotonic() + self._give_up_after
        while True:
            if not self._connected:
                if not finished:
                    return
                self._mend()
            try:
                self._say_goodbye(reason, message)
            except grpc.RpcError as error:
                if not finished:
                    _log.warning("the server was not told that this worker leaves: %s", _details(error))
                    return
                if _code(error) is not grpc.StatusCode.ABORTED and not self._may_pass(error):
                    raise self._refused(error) from None
                if time.monotonic() >= deadline:
                    raise self._unreachable(_WENT_AWAY, self._give_up_after, error) from None
                self._pause(_FIRST_BACKOFF)
                self._mend()
            else:
                return

    def undelivered(self) -> Sequence[pb.Measurement]:
        """Returns the measurements that were reported and are not known to have arrived."""
        return self._reports.undelivered()

    def close(self) -> None:
        """Frees the connection."""
        if self._stream is not None:
            self._stream.cancel()
            self._stream = None
        self._channel.close()

    def _say_goodbye(self, reason: pb.LeaveReason.ValueType, message: str) -> None:
        self._reports.flush(self._session, lambda request: self._stub.report(request, timeout=_CALL_SECONDS))
        goodbye = pb.LeaveRequest(session=self._session, reason=reason, message=message)
        self._stub.leave(goodbye, timeout=_CALL_SECONDS)

    # Connecting

    @property
    def _connected(self) -> bool:
        return self._stream is not None and self._stream.active

    def _open_channel(self) -> grpc.Channel:
        return grpc.insecure_channel(self._address, options=_OPTIONS)

    def _renew_channel(self) -> None:
        """Leaves a connection on which bytes were damaged or lost: whatever is sent on it next may be lost too."""
        self._channel.close()
        self._channel = self._open_channel()
        self._stub = _Stub(self._channel)

    def _reconnect(self) -> None:
        self._connect(self._give_up_after, _WENT_AWAY)
        _log.info("connected to %s again", self._address)
        if self._open is not None and self._stream is not None:
            self._stream.send(self._open)

    def _mend(self) -> None:
        """Opens a new session in the place of one that is over, unless the old one's stream ended in a way that forbids it."""
        if self._stream is not None:
            self._stream.cancel()  # whatever ended it is in its queue then
            try:
                while self._stream.receive(0) is not None:
                    pass
            except grpc.RpcError as error:
                self._broken(error)
        self._reconnect()

    def _connect(self, seconds: float, failure: str) -> pb.JoinResponse:
        request = self._request
        if request is None:
            raise RuntimeError("send and receive come after join")
        request.first_round = max(request.first_round, self._next_round)
        deadline = time.monotonic() + seconds
        backoff, told = _FIRST_BACKOFF, time.monotonic()
        while True:
            self._check_stop()
            left = deadline - time.monotonic()
            try:
                response = _join_response(self._stub.join(request, timeout=max(min(left, _CALL_SECONDS), 0.1)))
                self._session = response.session
                self._stream = _Stream(self._stub, response.session)
            except grpc.RpcError as error:
                if not self._may_pass(error):
                    raise self._refused(error) from None
                if time.monotonic() >= deadline:
                    raise self._unreachable(failure, seconds, error) from None
                if _code(error) is not grpc.StatusCode.UNAVAILABLE or isinstance(error, _Broken):
                    self._renew_channel()
                if time.monotonic() - told >= 5:
                    told = time.monotonic()
                    _log.info("waiting for server %s, %.0f s left", self._address, deadline - told)
                self._pause(min(backoff, max(deadline - time.monotonic(), 0)))
                backoff *= 2
            else:
                return response

    def _broken(self, error: grpc.RpcError) -> None:
        """Takes in that the stream ended; raises if joining again would not help."""
        if self._stream is not None:
            self._stream.cancel()
            self._stream = None
        code = _code(error)
        if code is grpc.StatusCode.ABORTED:
            trailing = dict(cast("Any", error).trailing_metadata() or ())
            if SUPERSEDED_KEY in trailing:
                raise WorkerError(_details(error), ExitCode.SUPERSEDED)
        elif code is not grpc.StatusCode.CANCELLED and not self._may_pass(error):
            raise self._refused(error)
        if code in _STRANGE or isinstance(error, _Broken):
            self._renew_channel()
        _log.warning("the connection to %s broke: %s; reconnecting", self._address, _details(error))

    def _may_pass(self, error: grpc.RpcError) -> bool:
        """Returns whether the same call may succeed later.

        A server that let this worker join is one of ours: a status that says otherwise comes from damage on the way, if it
        does not come again and again.
        """
        code = _code(error)
        if self._session and code in _STRANGE:
            self._strange += 1
            return self._strange < _STRANGE_ENDINGS
        return code in _RETRIED

    def _pause(self, seconds: float) -> None:
        """Waits about so long, and no longer than is useful; others that lost the same server come back at other times."""
        self._stop.wait(min(seconds, _LONGEST_BACKOFF) * random.uniform(0.5, 1.5))  # noqa: S311

    def _unreachable(self, failure: str, seconds: float, error: grpc.RpcError) -> WorkerError:
        return WorkerError(
            f"server {self._address} {failure} within {seconds:g} s: {_details(error)}; check that `codistill serve` runs "
            "there",
            ExitCode.UNREACHABLE,
        )

    def _refused(self, error: grpc.RpcError) -> WorkerError:
        code = _code(error)
        if code in _NAMELESS:
            return WorkerError(
                f"server {self._address} does not answer as an aggregation server ({code.name}: {_details(error)}); check "
                "the address and that both sides have the same version",
                ExitCode.REFUSED,
            )
        diverged = code is grpc.StatusCode.INVALID_ARGUMENT and "diverged" in _details(error)
        return WorkerError(
            f"server {self._address} refused: {_details(error)}", ExitCode.DIVERGED if diverged else ExitCode.REFUSED
        )

    def _gave_up(self, number: int, waiting: pb.Waiting | None, seconds: float) -> WorkerError:
        who = ", ".join(waiting.students) if waiting is not None and waiting.students else "the server"
        return WorkerError(
            f"gave up after {seconds:.0f} s: round {number} still waits for {who}; see why it is away, then resume the run "
            "(exchange.give_up_after sets this limit)",
            ExitCode.GAVE_UP,
        )

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Interrupted


class _Stub:
    """The server's calls: what is sent is sealed, what comes is taken as it came, as damage must not look like a refusal."""

    def __init__(self, channel: grpc.Channel) -> None:
        service = pb.DESCRIPTOR.services_by_name["Distillation"].full_name

        def unary(name: str) -> Any:
            return channel.unary_unary(f"/{service}/{name}", request_serializer=seal, response_deserializer=None)

        self.join = unary("Join")
        self.report = unary("Report")
        self.leave = unary("Leave")
        self.exchange: Any = channel.stream_stream(f"/{service}/Exchange", None, None)


class _Stream:
    """One Exchange call, read by a thread that ends with it."""

    def __init__(self, stub: _Stub, session: int) -> None:
        self._outgoing: queue.SimpleQueue[pb.Contribution | None] = queue.SimpleQueue()
        self._incoming: queue.SimpleQueue[pb.ExchangeReply | grpc.RpcError] = queue.SimpleQueue()
        contributions: Iterator[pb.Contribution] = iter(cast("Any", self._outgoing.get), None)
        requests = (seal(contribution, str(session)) for contribution in contributions)
        self._call: Any = stub.exchange(requests, metadata=((SESSION_KEY, str(session)),))
        self._thread = threading.Thread(target=self._read, name="codistill-replies", daemon=True)
        self._thread.start()

    @property
    def active(self) -> bool:
        return bool(self._call.is_active())

    def send(self, contribution: pb.Contribution) -> None:
        self._outgoing.put(contribution)

    def receive(self, seconds: float) -> pb.ExchangeReply | None:
        """Returns the next reply, or None if there is none in time.

        Raises:
            grpc.RpcError: the stream is over.
        """
        try:
            item = self._incoming.get(timeout=seconds) if seconds > 0 else self._incoming.get_nowait()
        except queue.Empty:
            return None
        if isinstance(item, grpc.RpcError):
            raise item
        return item

    def cancel(self) -> None:
        self._outgoing.put(None)
        self._call.cancel()
        self._thread.join(_CALL_SECONDS)

    def _read(self) -> None:
        try:
            for raw in self._call:
                if not is_whole(raw):
                    self._incoming.put(_Broken(f"a reply of {len(raw)} bytes {_DAMAGED}"))
                    self._call.cancel()
                    return
                self._incoming.put(pb.ExchangeReply.FromString(raw))
        except grpc.RpcError as error:
            self._incoming.put(error)
        else:
            self._incoming.put(_Broken("the server ended the stream"))


class _Broken(grpc.RpcError):
    """The connection cannot be used any more, and no status of the server's says why."""

    def __init__(self, details: str) -> None:
        self._details = details
        super().__init__(details)

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return self._details


def _join_response(raw: bytes) -> pb.JoinResponse:
    """Returns a response from its bytes.

    Raises:
        _Broken: they are not what the server sent.
    """
    damaged = _Broken(f"a JoinResponse of {len(raw)} bytes {_DAMAGED}")
    try:
        response = pb.JoinResponse.FromString(raw)
    except DecodeError:
        raise damaged from None
    if response.HasField("checksum") and not is_whole(raw):
        raise damaged
    return response


class _Reports:
    """Reports under way: one at a time, and nothing measured is lost while the server is away."""

    def __init__(self) -> None:
        self._pending: pb.ReportRequest | None = None
        self._sent: pb.ReportRequest | None = None
        self._call: Any = None

    def add(self, report: pb.ReportRequest) -> None:
        if self._pending is not None:
            merged = [*self._pending.measurements, *report.measurements]
            del report.measurements[:]
            report.measurements.extend(merged)
        self._pending = report

    def send(self, session: int, call: Callable[[pb.ReportRequest], Any]) -> None:
        if self._call is not None and not self._call.done():
            return
        self._settle()
        if self._pending is not None:
            self._pending.session = session
            self._sent, self._pending = self._pending, None
            self._call = call(self._sent)

    def flush(self, session: int, call: Callable[[pb.ReportRequest], object]) -> None:
        """Waits for the report under way, then delivers what is left."""
        if self._call is not None:
            with contextlib.suppress(grpc.RpcError, grpc.FutureTimeoutError):
                self._call.result(_CALL_SECONDS)
            self._settle()
        if self._pending is not None:
            self._pending.session = session
            call(self._pending)
            self._pending = None

    def undelivered(self) -> Sequence[pb.Measurement]:
        """Returns the measurements that are not known to have arrived."""
        if self._call is not None and self._call.done():
            self._settle()
        return [each for report in (self._sent, self._pending) if report is not None for each in report.measurements]

    def _settle(self) -> None:
        """Takes the finished call's report back if it did not arrive."""
        if self._call is None:
            return
        failed = self._call.exception()
        if failed is not None and self._sent is not None:
            lost, newer = self._sent, self._pending
            self._pending = lost
            if newer is not None:
                self.add(newer)
        self._call = self._sent = None


def _code(error: grpc.RpcError) -> grpc.StatusCode:
    code = getattr(error, "code", None)
    return code() if callable(code) else grpc.StatusCode.UNKNOWN  # pyright: ignore[reportReturnType]


def _details(error: grpc.RpcError) -> str:
    details = getattr(error, "details", None)
    text = details() if callable(details) else str(error)
    return " ".join(str(text).split())
