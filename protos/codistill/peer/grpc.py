"""The transport over gRPC: carries out what :mod:`codistill.peer.session` decides."""

from __future__ import annotations

import logging
import random
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import grpc

from codistill.peer.errors import Interrupted, PeerError
from codistill.peer.grpc_calls import Broken, Stub, decode_join_response, read_failure
from codistill.peer.grpc_reports import Reports
from codistill.peer.grpc_stream import Stream
from codistill.peer.log_backoff import LogBackoff
from codistill.peer.session import Session
from codistill.peer.steps import CALL_SECONDS, Cancel, Done, Failure, Join, Leave, Listen, Pause, Send
from codistill.process.exit_codes import ExitCode
from codistill.v1 import distillation_pb2 as pb
from codistill.wire import diagnose
from codistill.wire.channel import client_options
from codistill.wire.proxy import proxy_advice
from codistill.wire.security import Security
from codistill.wire.times import seconds

__all__ = ["GrpcTransport"]

_log = logging.getLogger(__name__)

_SLICE_SECONDS = 0.2
_DRAWS = random.SystemRandom()  # Python's global generator belongs to the student's model
_DIAGNOSE_SECONDS = 2.0


class GrpcTransport:
    """A peer's session with an aggregation server; see :class:`codistill.peer.base.Transport` for its calls.

    Args:
        address: the server's "HOST:PORT".
        connect_timeout: seconds to reach a server never reached before.
        give_up_after: seconds to wait for one round's targets, or for a server that went away.
        silence_after: seconds without a message after which a stream is abandoned although it is open. It must exceed the
            time between the server's notices.
        keepalive: seconds between the pings that find a server which vanished without a word.
        stop: set when the peer is asked to stop; ends every wait with :class:`Interrupted`.
        security: TLS and token.
        find: looks the server's address up before each attempt to join, as it may have moved; None while it is unknown.

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
        self._stub = Stub(self._channel)
        self._session = Session(address, connect_timeout, give_up_after, silence_after)
        self._worker_id = secrets.randbits(64)
        self._join_request = pb.JoinRequest()
        self._join_response = pb.JoinResponse()
        self._stream: Stream | None = None
        self._open: pb.ExchangeRequest | None = None
        self._leave_request = pb.LeaveRequest()
        self._reports = Reports(self._session.report_answered)
        self._reconnect_log = LogBackoff()
        self._waiting_log = LogBackoff()
        self._last_waiting: tuple[int, list[str]] | None = None

    def join(self, request: pb.JoinRequest) -> pb.JoinResponse:
        """Open the session and its stream."""
        self._join_request = request
        self._reconnect_log.begin(time.monotonic())
        self._session.join(request.first_round, time.monotonic())
        self._carry_out()
        return self._join_response

    def send(self, contribution: pb.ExchangeRequest) -> None:
        """Publish a round's outputs; does not wait."""
        self._open = contribution
        if self._session.send(contribution.round) and self._stream is not None:
            self._stream.send(contribution)

    def receive(self, round_number: int) -> pb.Targets:
        """Return the targets of a round; a broken connection is restored while it waits."""
        self._session.receive(round_number, time.monotonic())
        targets = self._carry_out()
        assert targets is not None  # noqa: S101 - nothing else ends the steps of a wait for targets
        self._open = None
        return targets

    def report(self, report: pb.ReportRequest) -> None:
        """Report progress without waiting, one report under way at a time."""
        self._reports.add(report)
        self._session.reached(report.round)
        self._join_request.steps_trained = report.steps_trained
        if not self._connected:
            if self._stop.is_set():
                return
            self._session.reconnect(time.monotonic())
            self._carry_out()
        self._reports.send(
            self._session.session_id, lambda request: self._stub.report.future(request, timeout=CALL_SECONDS)
        )

    def undelivered(self) -> Sequence[pb.Measurement]:
        """Return the measurements that were reported and are not known to have arrived."""
        return self._reports.undelivered()

    def leave(self, reason: pb.LeaveReason.ValueType, message: str) -> None:
        """Deliver what is left to report and end the session."""
        self._leave_request = pb.LeaveRequest(reason=reason, message=message)
        finished = reason == pb.LEAVE_REASON_FINISHED
        self._session.leave(time.monotonic(), finished=finished, active=self._connected)
        self._carry_out()

    def close(self) -> None:
        """Free the connection, within `CALL_SECONDS`."""
        self._cancel_stream()
        self._channel.close()

    @property
    def _connected(self) -> bool:
        return self._stream is not None and self._stream.active

    # Carrying out the session's steps

    def _carry_out(self) -> pb.Targets | None:
        """Take one step after the other until the goal is reached; return the targets, where these are the goal."""
        while True:
            step = self._session.step(time.monotonic(), _DRAWS.random())
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
                case Cancel():
                    error = self._cancel_stream()
                    self._broke(error, step.why)
                case Leave():
                    self._leave()

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Interrupted

    # Join

    def _join(self, step: Join) -> None:
        self._join_request.first_round = step.first_round
        self._join_request.worker_id, self._join_request.session_id = self._worker_id, step.session_id
        try:
            if self._follow_address() or step.new_channel:
                self._channel.close()
                self._channel = self._security.channel(self._address, self._options)
                self._stub = Stub(self._channel)
            self._join_response = decode_join_response(self._stub.join(self._join_request, timeout=step.timeout))
            self._stream = Stream(self._stub, self._join_response.session_id)
        except grpc.RpcError as error:
            if self._reconnect_log.due(time.monotonic()):
                _log.info("waiting for server %s, %.0f s left", self._address, max(step.remaining, 0))
            self._session.join_failed(self._diagnose(read_failure(error), step), time.monotonic())
        else:
            self._session.joined(self._join_response.session_id)
            if step.session_id:
                _log.info("connected to %s again", self._address)

    def _follow_address(self) -> bool:
        """Adopt the server's new address, if it has one, and return whether it has."""
        found = self._find()
        if found is None or found == self._address:
            return False
        _log.info("server %s is now %s", self._address, found)
        self._address = found
        self._session.moved(found)
        return True

    def _diagnose(self, failure: Failure, step: Join) -> Failure:
        """Return a failure, with what a probe of the port reveals if the status says little and people will read it.

        Where nothing is found, it names the proxy between the two, if there is one.

        Raises:
            PeerError: certificates keep out a peer that never joined. One that had joined tries again, as certificates may
                be renewed in time.
        """
        never_joined = not self._session.session_id
        if not failure.temporary or not (never_joined or self._session.overdue(time.monotonic())):
            return failure
        wrong = diagnose.explain(self._address, self._security, min(max(step.remaining, 0.1), _DIAGNOSE_SECONDS))
        if wrong is None:
            return replace(failure, advice=proxy_advice(self._address) or failure.advice)
        if never_joined:
            raise PeerError(f"server {self._address}: {wrong}", ExitCode.REFUSED)
        return replace(failure, details=wrong, advice="")

    # The stream

    def _listen(self, seconds: float) -> pb.Targets | None:
        """Pass one message, or the silence, to the session; return the targets, if it awaits them."""
        try:
            reply = self._next_reply(time.monotonic() + seconds)
        except grpc.RpcError as error:
            self._check_stop()
            self._cancel_stream()
            self._broke(error)
            return None
        if reply is None:
            self._session.silence(time.monotonic())
        elif reply.HasField("waiting"):
            self._check_stop()
            self._log_waiting(reply.waiting)
            self._session.waiting(reply.waiting.round, reply.waiting.participants, time.monotonic())
        elif self._session.targets(reply.targets.round, time.monotonic()):
            return reply.targets
        return None

    def _next_reply(self, deadline: float) -> pb.ExchangeResponse | None:
        """Return the next message, or None if none comes in time.

        Raises:
            grpc.RpcError: the stream is over.
            Interrupted: the peer was asked to stop.
        """
        while self._stream is not None and (left := deadline - time.monotonic()) > 0:
            reply = self._stream.receive(min(left, _SLICE_SECONDS))
            if reply is not None:
                return reply
            self._check_stop()
        return None

    def _log_waiting(self, waiting: pb.Waiting) -> None:
        """Log which participants a round waits for: at the first notice, then less and less often while they stay the same."""
        now = time.monotonic()
        content = (waiting.round, list(waiting.participants))
        if content != self._last_waiting:
            self._last_waiting = content
            self._waiting_log.begin(now)
        elif not self._waiting_log.due(now):
            return
        _log.info(
            "round %d waits for %s, %.0f s", waiting.round, ", ".join(waiting.participants), seconds(waiting.elapsed)
        )

    def _cancel_stream(self) -> grpc.RpcError:
        """End the stream, if there is one, and return how it ended."""
        stream, self._stream = self._stream, None
        return Broken("the server ended the stream") if stream is None else stream.cancel()

    def _broke(self, error: grpc.RpcError, why: str = "") -> None:
        self._reconnect_log.begin(time.monotonic())
        failure = read_failure(error)
        self._session.broke(failure, time.monotonic())
        _log.warning("the connection to %s broke: %s; reconnecting", self._address, why or failure.details)

    # Leave

    def _leave(self) -> None:
        session_id = self._leave_request.session_id = self._session.session_id
        try:
            self._reports.flush(session_id, lambda request: self._stub.report(request, timeout=CALL_SECONDS))
            self._stub.leave(self._leave_request, timeout=CALL_SECONDS)
        except grpc.RpcError as error:
            failure = read_failure(error)
            self._session.leave_failed(failure, time.monotonic())
            _log.warning("the server was not told that this worker leaves: %s", failure.details)
        else:
            self._session.left()
            self._cancel_stream()  # the server may wait for that
