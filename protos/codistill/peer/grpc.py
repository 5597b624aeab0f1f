"""The exchange over gRPC: the channel, the stream and its reading thread, the reports.

What to do next is decided in :mod:`codistill.peer.session`; here it is done. A thread reads the stream into a queue, so
that every wait for a reply has a limit and ends when the worker is told to stop, without tearing down the session that it
has yet to say goodbye on.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import grpc
from google.protobuf.message import DecodeError

from codistill.peer.errors import Interrupted, PeerError
from codistill.peer.log_backoff import LogBackoff
from codistill.peer.session import CALL_SECONDS, Done, Failure, Goodbye, HangUp, Join, Listen, Pause, Send, Session
from codistill.process.exit_codes import ExitCode
from codistill.v1 import distillation_pb2 as pb
from codistill.wire import diagnose
from codistill.wire.channel import PUSHBACK_KEY, SESSION_KEY, SUPERSEDED_KEY, client_options
from codistill.wire.checksum import append_checksum, format_session, verify_checksum
from codistill.wire.security import Security

__all__ = ["GrpcTransport"]

_log = logging.getLogger(__name__)

_SLICE_SECONDS = 0.2
_LOOK_SECONDS = 2.0

_DAMAGED = "was damaged on the way: its checksum is missing or wrong"


class GrpcTransport:
    """A student's session with an aggregation server.

    Args:
        address: the server's "HOST:PORT".
        connect_timeout: seconds to reach a server never reached before.
        give_up_after: seconds to wait for one round's targets, or for a server that went away.
        silence_after: seconds without targets or a notice after which a stream is taken to have lost what was sent on it,
            although it stands; longer than the time between the server's notices.
        keepalive: seconds between the pings that find a server which vanished without a word.
        stop: set when the worker is asked to stop; ends every wait with :class:`Interrupted`.
        security: TLS and token.
        find: looks the server's address up again before each attempt to join, as it may have moved; None while it is not
            known.

    Raises:
        SecurityError: a certificate or key cannot be used.
    """

    def __init__(
        self,
        address: str,
        *,
        connect_timeout: float,
        give_up_after: float,
        silence_after: float = 20.0,
        keepalive: float = 20.0,
        stop: threading.Event,
        security: Security | None = None,
        find: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._security = security or Security()
        self._address = address
        self._find = find
        self._stop = stop
        self._options = client_options(keepalive)
        self._channel = self._security.channel(address, self._options)
        self._stub = _Stub(self._channel)
        self._session = Session(address, connect_timeout, give_up_after, silence_after)
        self._worker = secrets.randbits(64)
        self._request = pb.JoinRequest()
        self._response = pb.JoinResponse()
        self._stream: _Stream | None = None
        self._open: pb.Contribution | None = None
        self._goodbye = pb.LeaveRequest()
        self._absence = LogBackoff()
        self._round = LogBackoff()
        self._waits: tuple[int, list[str]] | None = None
        self._reports = _Reports(self._session.answered)

    def join(self, request: pb.JoinRequest) -> pb.JoinResponse:
        """Opens the session and its stream.

        Raises:
            PeerError: the server cannot be reached in time, or refuses; the text says why.
            Interrupted: the worker was asked to stop.
        """
        self._request = request
        self._absence.begin(time.monotonic())
        self._session.join(request.first_round, time.monotonic())
        self._carry_out()
        return self._response

    def send(self, contribution: pb.Contribution) -> None:
        """Publishes a round's outputs; does not wait."""
        self._open = contribution
        if self._session.send(contribution.round) and self._stream is not None:
            self._stream.send(contribution)

    def receive(self, number: int) -> pb.Targets:
        """Returns the targets of a round, waiting for them; a broken connection is mended meanwhile.

        Raises:
            PeerError: the wait outlasted `give_up_after`, the server stayed away, or it refused.
            Interrupted: the worker was asked to stop.
        """
        self._session.receive(number, time.monotonic())
        targets = self._carry_out()
        assert targets is not None  # noqa: S101 - nothing else ends the steps of a wait for targets
        self._open = None
        return targets

    def report(self, report: pb.ReportRequest) -> None:
        """Reports progress without waiting, one report under way at a time.

        A connection that is found broken is mended first, unless the worker was asked to stop: then the report is kept.

        Raises:
            PeerError: the server stayed away, or refused.
            Interrupted: the worker was asked to stop while the connection was mended.
        """
        self._reports.add(report)
        self._session.reached(report.round)
        if not self._connected:
            if self._stop.is_set():
                return
            self._session.mend(time.monotonic())
            self._carry_out()
        self._reports.send(
            self._session.number, lambda request: self._stub.report.future(request, timeout=CALL_SECONDS)
        )

    def leave(self, reason: pb.LeaveReason.ValueType, message: str) -> None:
        """Delivers what is left to report and ends the session.

        The others wait for a student until the server knows that it finished; so for that, a broken connection is mended.
        For any other reason the end of the connection tells the server enough.

        Raises:
            PeerError: a student that finished could not say so: the server stayed away, refused, or has a newer worker.
            Interrupted: the worker was asked to stop before it could say so.
        """
        self._goodbye = pb.LeaveRequest(reason=reason, message=message)
        finished = reason == pb.LEAVE_REASON_FINISHED
        self._session.leave(time.monotonic(), finished=finished, active=self._connected)
        self._carry_out()

    def undelivered(self) -> Sequence[pb.Measurement]:
        """Returns the measurements that were reported and are not known to have arrived."""
        return self._reports.undelivered()

    def close(self) -> None:
        """Frees the connection."""
        self._let_go()
        self._channel.close()

    @property
    def _connected(self) -> bool:
        return self._stream is not None and self._stream.active

    # Carrying out what the session decides

    def _carry_out(self) -> pb.Targets | None:
        """Takes one step after the other until all is done, or the targets are there."""
        while True:
            step = self._session.step(time.monotonic(), random.random())  # noqa: S311
            match step:
                case Done():
                    return None
                case Pause():
                    self._stop.wait(step.seconds)
                case Join():
                    self._check_stop()
                    self._join(step)
                case Send():
                    if self._stream is not None and self._open is not None:
                        self._stream.send(self._open)
                case Listen():
                    targets = self._listen(step.seconds)
                    if targets is not None:
                        return targets
                case HangUp():
                    self._broke(self._hang_up(), step.why)
                case Goodbye():
                    self._say_goodbye()

    def _join(self, step: Join) -> None:
        self._request.first_round = step.first_round
        self._request.worker, self._request.session = self._worker, step.session
        again = self._session.number
        try:
            if self._moved() or step.renew:
                self._renew_channel()
            self._response = _join_response(self._stub.join(self._request, timeout=step.timeout))
            self._stream = _Stream(self._stub, self._response.session)
        except grpc.RpcError as error:
            if self._absence.due(time.monotonic()):
                _log.info("waiting for server %s, %.0f s left", self._address, max(step.left, 0))
            self._session.join_failed(self._look(_failure(error), step), time.monotonic())
        else:
            self._session.joined(self._response.session)
            if again:
                _log.info("connected to %s again", self._address)

    def _moved(self) -> bool:
        """Whether the server has another address now, which is taken over."""
        found = self._find()
        if found is None or found == self._address:
            return False
        _log.info("server %s is now %s", self._address, found)
        self._address = found
        self._session.moved(found)
        return True

    def _renew_channel(self) -> None:
        self._channel.close()
        self._channel = self._security.channel(self._address, self._options)
        self._stub = _Stub(self._channel)

    def _look(self, failure: Failure, step: Join) -> Failure:
        """Looks at the port where a failure is not plain, and returns it with what was found.

        Raises:
            PeerError: certificates keep a worker out that was never in; later they may be renewed in time.
        """
        never_in = not self._session.number
        if not failure.temporary or not (never_in or self._session.overdue(time.monotonic())):
            return failure
        wrong = diagnose.explain(self._address, self._security, min(max(step.left, 0.1), _LOOK_SECONDS))
        if wrong is None:
            return failure
        if never_in:
            raise PeerError(f"server {self._address}: {wrong}", ExitCode.REFUSED)
        return replace(failure, details=wrong, advice="")

    def _listen(self, seconds: float) -> pb.Targets | None:
        """Hands the session one message, or the silence, and returns the targets that it waits for."""
        deadline = time.monotonic() + seconds
        reply: pb.ExchangeReply | None = None
        while reply is None:
            stream = self._stream
            left = deadline - time.monotonic()
            if stream is None or left <= 0:
                self._session.silence(time.monotonic())
                return None
            try:
                reply = stream.receive(min(left, _SLICE_SECONDS))
            except grpc.RpcError as error:
                self._check_stop()
                self._broke(error)
                return None
            if reply is None:
                self._check_stop()
        if reply.HasField("waiting"):
            self._check_stop()
            told = reply.waiting
            self._tell(told)
            self._session.waiting(told.round, told.students, time.monotonic())
        elif self._session.targets(reply.targets.round, time.monotonic()):
            return reply.targets
        return None

    def _tell(self, told: pb.Waiting) -> None:
        """Logs whom a round waits for: at the first notice, and while they stay the same less and less often."""
        now = time.monotonic()
        waits = (told.round, list(told.students))
        if waits != self._waits:
            self._waits = waits
            self._round.begin(now)
        elif not self._round.due(now):
            return
        _log.info("round %d waits for %s, %.0f s", told.round, ", ".join(told.students), told.seconds)

    def _let_go(self) -> None:
        if self._stream is not None:
            self._stream.cancel()
            self._stream = None

    def _broke(self, error: grpc.RpcError, why: str = "") -> None:
        self._let_go()
        self._absence.begin(time.monotonic())
        failure = _failure(error)
        self._session.broke(failure, time.monotonic())
        _log.warning("the connection to %s broke: %s; reconnecting", self._address, why or failure.details)

    def _hang_up(self) -> grpc.RpcError:
        """Ends the stream, if it has not ended, and returns how it did."""
        if self._stream is not None:
            self._stream.cancel()  # whatever ended it is in its queue then
            try:
                while self._stream.receive(0) is not None:
                    pass
            except grpc.RpcError as error:
                return error
        return _Broken("the server ended the stream")

    def _say_goodbye(self) -> None:
        self._goodbye.session = self._session.number
        try:
            self._reports.flush(self._session.number, lambda request: self._stub.report(request, timeout=CALL_SECONDS))
            self._stub.leave(self._goodbye, timeout=CALL_SECONDS)
        except grpc.RpcError as error:
            failure = _failure(error)
            self._session.goodbye_failed(failure, time.monotonic())
            _log.warning("the server was not told that this worker leaves: %s", failure.details)
        else:
            self._session.left()
            self._let_go()  # the server may wait for that

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Interrupted


class _Stub:
    """The server's calls: what is sent is sealed, what comes is taken as it came, as damage must not look like a refusal."""

    def __init__(self, channel: grpc.Channel) -> None:
        service = pb.DESCRIPTOR.services_by_name["Distillation"].full_name

        def unary(name: str) -> Any:
            return channel.unary_unary(
                f"/{service}/{name}", request_serializer=append_checksum, response_deserializer=None
            )

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
        requests = (append_checksum(contribution, str(session)) for contribution in contributions)
        self._call: Any = stub.exchange(requests, metadata=((SESSION_KEY, format_session(session)),))
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
        self._thread.join(CALL_SECONDS)

    def _read(self) -> None:
        try:
            for raw in self._call:
                if not verify_checksum(raw):
                    self._incoming.put(_Damaged(f"a reply of {len(raw)} bytes {_DAMAGED}"))
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


class _Damaged(_Broken):
    """What came is not what the server sent."""


def _join_response(raw: bytes) -> pb.JoinResponse:
    """Returns a response from its bytes.

    Raises:
        _Damaged: they are not what the server sent.
    """
    damaged = _Damaged(f"a JoinResponse of {len(raw)} bytes {_DAMAGED}")
    try:
        response = pb.JoinResponse.FromString(raw)
    except DecodeError:
        raise damaged from None
    if response.HasField("checksum") and not verify_checksum(raw):
        raise damaged
    return response


class _Reports:
    """Reports under way: one at a time, and nothing measured is lost while the server is away.

    Args:
        arrived: called when one has arrived.
    """

    def __init__(self, arrived: Callable[[], None]) -> None:
        self._arrived = arrived
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
                self._call.result(CALL_SECONDS)
            self._settle()
        if self._pending is not None:
            self._pending.session = session
            call(self._pending)
            self._pending = None
            self._arrived()

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
        if failed is None:
            self._arrived()
        elif self._sent is not None:
            lost, newer = self._sent, self._pending
            self._pending = lost
            if newer is not None:
                self.add(newer)
        self._call = self._sent = None


def _failure(error: grpc.RpcError) -> Failure:
    said = cast("Any", error)
    code = said.code() if callable(getattr(error, "code", None)) else grpc.StatusCode.UNKNOWN
    details = said.details() if callable(getattr(error, "details", None)) else str(error)
    trailing = dict(getattr(error, "trailing_metadata", tuple)() or ())
    superseded = code is grpc.StatusCode.ABORTED and SUPERSEDED_KEY in trailing
    text = " ".join(str(details).split())
    return Failure(code.name, text, superseded, PUSHBACK_KEY in trailing, isinstance(error, _Damaged))
