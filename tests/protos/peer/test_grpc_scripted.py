"""The transport over gRPC, against servers that misbehave by script."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
import torch

from codistill.peer.errors import PeerError
from codistill.peer.steps import Failure
from codistill.process.exit_codes import ExitCode
from codistill.v1 import distillation_pb2 as pb
from codistill.v1.distillation_pb2_grpc import DistillationServiceServicer, add_DistillationServiceServicer_to_server
from codistill.wire.channel import SESSION_KEY, SUPERSEDED_KEY
from codistill.wire.checksum import append_checksum, parse_session, verify_checksum
from codistill.wire.tensors import decode, encode
from codistill.wire.times import duration
from protos.peer.support import BOUND, Connect, contribution, report, wait_for


class Script(DistillationServiceServicer):
    """A server that does what a test tells it; by default it answers every contribution with targets of its own."""

    def __init__(self) -> None:
        self.joins: list[pb.JoinRequest] = []
        self.sent: list[tuple[int, int]] = []
        self.contributions: list[pb.ExchangeRequest] = []
        self.reports: list[pb.ReportRequest] = []
        self.left: list[pb.LeaveRequest] = []
        self.answer: Callable[[int, int, Any], Iterator[pb.ExchangeResponse]] = lambda _session, number, _context: iter(
            [reply(number)]
        )
        self.on_join: Callable[[int], pb.JoinResponse] = lambda number: pb.JoinResponse(session_id=number, run="script")
        self.on_report: Callable[[int, Any], None] = lambda _number, _context: None
        self.on_leave: Callable[[int, Any], None] = lambda _number, _context: None

    def Join(self, request: pb.JoinRequest, context: Any) -> pb.JoinResponse:  # noqa: N802 - the rpc's name
        del context
        taken = pb.JoinRequest()
        taken.CopyFrom(request)
        self.joins.append(taken)
        return self.on_join(len(self.joins))

    def Exchange(self, request_iterator: Any, context: Any) -> Iterator[pb.ExchangeResponse]:  # noqa: N802
        session = parse_session(dict(context.invocation_metadata())[SESSION_KEY])
        assert session is not None
        context.send_initial_metadata(())
        for received in request_iterator:
            self.sent.append((session, received.round))
            self.contributions.append(received)
            yield from self.answer(session, received.round, context)

    def Report(self, request: pb.ReportRequest, context: Any) -> pb.ReportResponse:  # noqa: N802
        self.reports.append(request)
        self.on_report(len(self.reports), context)
        return pb.ReportResponse()

    def Leave(self, request: pb.LeaveRequest, context: Any) -> pb.LeaveResponse:  # noqa: N802
        self.left.append(request)
        self.on_leave(len(self.left), context)
        return pb.LeaveResponse()


def reply(number: int) -> pb.ExchangeResponse:
    values = {"logits": encode(torch.full((1, 1), float(number)), "float32")}
    return with_checksum(pb.ExchangeResponse(targets=pb.Targets(round=number, targets=values)))


def with_checksum(message: pb.ExchangeResponse) -> pb.ExchangeResponse:
    return pb.ExchangeResponse.FromString(append_checksum(message))


@pytest.fixture
def script() -> Iterator[tuple[Script, str]]:
    made = Script()
    with ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool)
        add_DistillationServiceServicer_to_server(made, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield made, f"127.0.0.1:{port}"
        server.stop(0).wait()


def value(targets: pb.Targets) -> float:
    return decode(targets.targets["logits"]).item()


def test_a_lost_reply_is_asked_for_again(script: tuple[Script, str], connect: Connect) -> None:
    server, address = script

    def lose_it(session: int, number: int, context: Any) -> Iterator[pb.ExchangeResponse]:
        if session == 1 and number == 6:
            context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        yield reply(number)

    server.answer = lose_it
    transport = connect(address)
    transport.join(pb.JoinRequest(first_round=4))
    for number in (4, 5, 6, 7):
        transport.send(contribution(number, 0))
        assert value(transport.receive(number)) == number
    assert server.sent == [(1, 4), (1, 5), (1, 6), (2, 6), (2, 7)], "what is open is sent again, in a new session"
    assert [found.first_round for found in server.joins] == [4, 6], "rounds before it are not asked for"


def test_duplicated_and_late_replies_are_passed_over(script: tuple[Script, str], connect: Connect) -> None:
    server, address = script

    def stutter(session: int, number: int, context: Any) -> Iterator[pb.ExchangeResponse]:
        if number:
            yield reply(number - 1)
        yield with_checksum(
            pb.ExchangeResponse(waiting=pb.Waiting(round=number, participants=["mlp"], elapsed=duration(1)))
        )
        yield reply(number)
        yield reply(number)

    server.answer = stutter
    transport = connect(address)
    transport.join(pb.JoinRequest())
    for number in range(5):
        transport.send(contribution(number, 0))
        assert value(transport.receive(number)) == number
    assert len(server.joins) == 1


@pytest.mark.parametrize("how", ["aborted", "ended"])
def test_a_stream_that_ends_without_being_superseded_is_opened_again(
    how: str, script: tuple[Script, str], connect: Connect
) -> None:
    server, address = script

    def once(session: int, number: int, context: Any) -> Iterator[pb.ExchangeResponse]:
        if session == 1 and how == "aborted":
            context.abort(grpc.StatusCode.ABORTED, "evicted; join again")
        if session == 1:
            context.cancel()
        yield reply(number)

    server.answer = once
    transport = connect(address)
    transport.join(pb.JoinRequest())
    transport.send(contribution(0, 0))
    assert value(transport.receive(0)) == 0
    assert len(server.joins) == 2


def test_a_damaged_reply_is_never_used_and_asked_for_again(script: tuple[Script, str], connect: Connect) -> None:
    server, address = script

    def damage(session: int, number: int, context: Any) -> Iterator[pb.ExchangeResponse]:
        answer = reply(number)
        if session == 1:
            answer.targets.targets["logits"].CopyFrom(encode(torch.full((1, 1), 99.0), "float32"))
        elif session == 2:
            answer.ClearField("checksum")
        yield answer

    server.answer = damage
    transport = connect(address)
    transport.join(pb.JoinRequest(participant="cnn"))
    transport.send(contribution(3, 0))
    assert value(transport.receive(3)) == 3.0
    assert server.sent == [(1, 3), (2, 3), (3, 3)]


def test_a_stream_that_stands_but_lost_the_contribution_is_left(script: tuple[Script, str], connect: Connect) -> None:
    """A damaged header can have the other side drop a message; no status tells, and pings are answered."""
    server, address = script
    server.answer = lambda session, number, _: iter([reply(number)] if session == 3 else [])
    transport = connect(address, silence_after=0.5)
    transport.join(pb.JoinRequest(participant="cnn"))
    transport.send(contribution(3, 0))
    started = time.monotonic()
    assert value(transport.receive(3)) == 3.0
    assert 1.0 <= time.monotonic() - started < BOUND
    assert server.sent == [(1, 3), (2, 3), (3, 3)]


def test_a_server_that_sends_notices_is_not_left(script: tuple[Script, str], connect: Connect) -> None:
    server, address = script

    def notices(session: int, number: int, context: Any) -> Iterator[pb.ExchangeResponse]:
        for _ in range(10):
            time.sleep(0.1)
            yield with_checksum(
                pb.ExchangeResponse(waiting=pb.Waiting(round=number, participants=["mlp"], elapsed=duration(1)))
            )
        yield reply(number)

    server.answer = notices
    transport = connect(address, silence_after=0.6)
    transport.join(pb.JoinRequest(participant="cnn"))
    transport.send(contribution(3, 0))
    assert value(transport.receive(3)) == 3.0
    assert server.sent == [(1, 3)]


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.RESOURCE_EXHAUSTED]
)
def test_failures_that_damage_can_cause_pass(
    code: grpc.StatusCode, script: tuple[Script, str], connect: Connect
) -> None:
    server, address = script
    damaged = {1, 2, 4, 5}

    def damage(session: int, number: int, context: Any) -> Iterator[pb.ExchangeResponse]:
        if session in damaged:
            context.abort(code, "frame of unknown type")
        yield reply(number)

    server.answer = damage
    transport = connect(address)
    transport.join(pb.JoinRequest(participant="cnn"))
    for number in (3, 4):
        transport.send(contribution(number, 0))
        assert value(transport.receive(number)) == number
        if transport._stream is not None:
            transport._stream.cancel()
    transport.close()
    damaged |= set(range(100))
    again = connect(address)
    again.join(pb.JoinRequest(participant="cnn"))
    again.send(contribution(5, 0))
    with pytest.raises(PeerError, match="frame of unknown type") as ended:
        again.receive(5)
    assert ended.value.code is ExitCode.REFUSED, "but not for ever"


def test_what_is_sent_has_a_checksum(script: tuple[Script, str], connect: Connect) -> None:
    server, address = script
    transport = connect(address)
    transport.join(pb.JoinRequest(participant="cnn"))
    sent = contribution(3, 0)
    transport.send(sent)
    transport.receive(3)
    transport.report(report(4, 4))
    transport.leave(pb.LEAVE_REASON_FINISHED, "done")
    assert [found.checksum for found in server.contributions] == [
        pb.ExchangeRequest.FromString(append_checksum(sent, "1")).checksum,
    ]
    for message in (*server.joins, *server.reports, *server.left):
        assert verify_checksum(message.SerializeToString())


def test_a_damaged_response_to_a_join_opens_no_session(script: tuple[Script, str], connect: Connect) -> None:
    """Another's session in it would have this participant take the other's place."""
    server, address = script
    server.on_join = lambda number: pb.JoinResponse(
        session_id=number, run="script", checksum=1 if number == 1 else None
    )
    transport = connect(address)
    assert transport.join(pb.JoinRequest(participant="cnn")).session_id == 2


def test_superseded_is_read_from_the_trailing_metadata(script: tuple[Script, str], connect: Connect) -> None:
    server, address = script

    def supersede(session: int, number: int, context: Any) -> Iterator[pb.ExchangeResponse]:
        context.set_trailing_metadata(((SUPERSEDED_KEY, "1"),))
        context.abort(grpc.StatusCode.ABORTED, "a newer worker is here")
        yield reply(number)

    server.answer = supersede
    transport = connect(address)
    transport.join(pb.JoinRequest())
    transport.send(contribution(0, 0))
    with pytest.raises(PeerError, match="a newer worker is here") as ended:
        transport.receive(0)
    assert ended.value.code is ExitCode.SUPERSEDED
    assert len(server.joins) == 1


def test_a_server_that_breaks_every_stream_is_given_up(script: tuple[Script, str], connect: Connect) -> None:
    server, address = script

    def never(session: int, number: int, context: Any) -> Iterator[pb.ExchangeResponse]:
        context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        yield reply(number)

    server.answer = never
    transport = connect(address, give_up_after=2)
    transport.join(pb.JoinRequest())
    transport.send(contribution(0, 0))
    started = time.monotonic()
    with pytest.raises(PeerError, match="gave up after") as ended:
        transport.receive(0)
    assert time.monotonic() - started < BOUND
    assert ended.value.code is ExitCode.GAVE_UP
    assert len(server.joins) < 12, "it paused between its attempts"


def test_a_server_that_never_answers_a_round_is_given_up(script: tuple[Script, str], connect: Connect) -> None:
    server, address = script
    server.answer = lambda _session, _number, _context: iter(())
    transport = connect(address, give_up_after=1)
    transport.join(pb.JoinRequest())
    transport.send(contribution(7, 0))
    started = time.monotonic()
    with pytest.raises(PeerError, match="gave up after 1 s: round 7 still waits for the server"):
        transport.receive(7)
    assert time.monotonic() - started < BOUND


def test_a_report_that_fails_goes_with_the_next(script: tuple[Script, str], connect: Connect) -> None:
    server, address = script

    def fail_first(number: int, context: Any) -> None:
        if number == 1:
            context.abort(grpc.StatusCode.UNAVAILABLE, "lost")

    server.on_report = fail_first
    transport = connect(address)
    transport.join(pb.JoinRequest())
    transport.report(report(1, 1))
    wait_for(lambda: server.reports, "the first report")
    assert [found.steps_trained for found in transport.undelivered()] == [1]
    transport.leave(pb.LEAVE_REASON_STOPPED, "")
    assert transport.undelivered() == []
    assert [[found.steps_trained for found in one.measurements] for one in server.reports] == [[1], [1]]
    assert [found.reason for found in server.left] == [pb.LEAVE_REASON_STOPPED]


def test_a_session_without_rounds_survives_failures_that_damage_can_cause(
    script: tuple[Script, str], connect: Connect
) -> None:
    """Only its reports tell that the server is well in between."""
    server, address = script
    transport = connect(address)
    transport.join(pb.JoinRequest())
    for number in range(1, 9):
        transport.report(report(number, number))
        wait_for(transport._reports._call.done, "it has arrived")
        assert transport._stream is not None
        transport._stream.cancel()
        transport._session.broke(Failure("INTERNAL", "frame of unknown type"), time.monotonic())
    transport.leave(pb.LEAVE_REASON_FINISHED, "")
    assert len(server.left) == 1


def test_one_report_is_under_way_at_a_time_and_none_waits(script: tuple[Script, str], connect: Connect) -> None:
    server, address = script
    go_on = threading.Event()
    server.on_report = lambda number, _: None if number > 1 else (go_on.wait(30), None)[1]
    transport = connect(address)
    transport.join(pb.JoinRequest())
    for number in range(1, 6):
        transport.report(report(number, number, 10 + number))
    assert sorted(found.steps_trained for found in transport.undelivered()) == [1, 2, 3, 4, 5, 11, 12, 13, 14, 15]
    go_on.set()
    transport.leave(pb.LEAVE_REASON_FINISHED, "")
    assert [[found.steps_trained for found in one.measurements] for one in server.reports] == [
        [1, 11],
        [2, 12, 3, 13, 4, 14, 5, 15],
    ]
    assert server.reports[-1].round == 5, "of the state, the newest counts"


def test_a_leave_that_fails_is_repeated_in_a_new_session(script: tuple[Script, str], connect: Connect) -> None:
    server, address = script

    def not_yet(number: int, context: Any) -> None:
        if number < 3:
            context.abort(grpc.StatusCode.UNAVAILABLE if number == 1 else grpc.StatusCode.ABORTED, "no")

    server.on_leave = not_yet
    transport = connect(address)
    transport.join(pb.JoinRequest())
    transport.report(report(9, 9))
    transport.leave(pb.LEAVE_REASON_FINISHED, "done")
    assert [found.session_id for found in server.left] == [1, 2, 3]
    assert [found.first_round for found in server.joins] == [0, 9, 9]
    assert len(server.reports) == 1


def test_a_leave_that_is_refused(script: tuple[Script, str], connect: Connect) -> None:
    server, address = script
    server.on_leave = lambda _, context: context.abort(grpc.StatusCode.FAILED_PRECONDITION, "no,\nnever")
    transport = connect(address)
    transport.join(pb.JoinRequest())
    with pytest.raises(PeerError, match="refused: no, never") as ended:
        transport.leave(pb.LEAVE_REASON_FINISHED, "")
    assert ended.value.code is ExitCode.REFUSED
    transport.leave(pb.LEAVE_REASON_FAILED, "")  # logs, as there is nothing more to do
