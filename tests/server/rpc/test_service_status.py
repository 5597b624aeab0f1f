from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import AsyncGenerator
from typing import Any, cast

import grpc
import grpc.aio
import pytest
import torch

from codistill.config.fingerprint import identity
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.channel import SESSION_KEY, SUPERSEDED_KEY
from codistill.wire.checksum import append_checksum, format_session, verify_checksum
from codistill.wire.tensors import encode
from codistill_server.admission.contributions import receive_limit
from codistill_server.coordinator import Coordinator
from codistill_server.observability.state import RunState
from codistill_server.rounds.events import Status
from codistill_server.rpc.service import DistillationService
from codistill_server.storage.journal import Journal
from server.rpc.support import EXCHANGE, Student, as_sealed, drive, error_of, serving, trailing, until
from server.support import BATCH, CLASSES, contribution, join_request, make_experiment

UNARY = {"Join": pb.JoinRequest, "Report": pb.ReportRequest, "Leave": pb.LeaveRequest}


class TestStatus:
    def test_headers_that_are_under_way_do_not_lose_the_status(self) -> None:
        """gRPC sends none then: the worker would be told UNKNOWN, and not what is wrong with what it sent."""

        class Context:
            headers = "not sent"
            told: grpc.StatusCode | None = None

            def __init__(self, session: int) -> None:
                self.session = session

            def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
                return ((SESSION_KEY, format_session(self.session)),)

            async def send_initial_metadata(self, _: object) -> None:
                self.headers = "under way"
                for _ in range(20):
                    await asyncio.sleep(0)
                self.headers = "sent"

            async def abort(self, code: grpc.StatusCode, *_: object) -> None:
                assert self.headers == "sent"
                self.told = code
                raise asyncio.CancelledError  # as gRPC's ends the call

        async def test() -> None:
            experiment = make_experiment()
            journal = Journal(None, identity(experiment))
            coordinator = Coordinator(experiment, journal, RunState(experiment, lambda _: None))
            context = Context(coordinator.join(join_request(experiment, "ant")).session)

            async def requests() -> AsyncGenerator[bytes]:
                yield as_sealed(b"no message", context.session)

            with contextlib.suppress(asyncio.CancelledError):
                await DistillationService(coordinator, lambda _: None)._exchange(requests(), cast("Any", context))
            assert context.told is grpc.StatusCode.INVALID_ARGUMENT
            coordinator.close()

        drive(test)

    def test_a_join_that_differs(self) -> None:
        async def test() -> None:
            async with serving() as served:
                for changes in ({"protocol_version": 9}, {"student": "cow"}, {"student": "😀" * 8_000}):
                    error = await error_of(served.stub.Join(join_request(served.experiment, "ant", **changes)))
                    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
                    assert SUPERSEDED_KEY not in trailing(error)

        drive(test)

    def test_contributions_that_are_wrong(self) -> None:
        async def test() -> None:
            async with serving() as served:
                broken = contribution(served.experiment, "ant", 0)
                broken.batch.outputs["logits"].CopyFrom(encode(torch.full((BATCH, CLASSES), torch.nan), "float32"))
                future = contribution(served.experiment, "ant", 5)
                other = contribution(served.experiment, "ant", 0, first=7)
                bee = Student(served, "bee")
                await bee.start()
                await bee.send(0)
                for message, code, part in (
                    (broken, grpc.StatusCode.INVALID_ARGUMENT, "batch.outputs.logits[0, 0] is nan"),
                    (future, grpc.StatusCode.ABORTED, "expected round 0"),
                    (other, grpc.StatusCode.FAILED_PRECONDITION, "student 'ant' has at position 0 sample 7"),
                ):
                    ant = Student(served, "ant")
                    await ant.start()
                    await ant.contribute(message)
                    error = await ant.ending()
                    assert error.code() is code
                    assert part in (error.details() or "")
                    assert SUPERSEDED_KEY not in trailing(error)
                    assert served.presence == {"ant": "absent", "bee": "present"}
                ant = Student(served, "ant")
                await ant.start()
                await ant.send(0)
                assert await ant.answer() == await bee.answer()
                assert served.coordinator.observations.rejected == {
                    Status.ABORTED: 1,
                    Status.FAILED_PRECONDITION: 1,
                    Status.INVALID_ARGUMENT: 1,
                }

        drive(test)

    def test_the_older_worker_is_told_that_it_is_superseded(self) -> None:
        async def test() -> None:
            async with serving() as served:
                older, newer = Student(served, "ant"), Student(served, "ant")
                await older.start()
                await newer.start()
                error = await older.ending()
                assert error.code() is grpc.StatusCode.ABORTED
                assert trailing(error)[SUPERSEDED_KEY] == "1"
                assert "newer worker" in (error.details() or "")
                assert served.presence["ant"] == "present"
                late = await error_of(served.stub.Report(pb.ReportRequest(session=older.session)))
                assert late.code() is grpc.StatusCode.ABORTED

        drive(test)

    def test_calls_on_a_session_that_is_over(self) -> None:
        async def test() -> None:
            async with serving() as served:
                calls = (
                    served.stub.Report(pb.ReportRequest(session=3)),
                    served.stub.Leave(pb.LeaveRequest(session=3, reason=pb.LEAVE_REASON_STOPPED)),
                )
                for call in calls:
                    error = await error_of(call)
                    assert error.code() is grpc.StatusCode.ABORTED
                    assert "session 3" in (error.details() or "")
                    assert "join again" in (error.details() or "")
                unknown = await error_of(served.stub.Leave(pb.LeaveRequest(session=3)))
                assert unknown.code() is grpc.StatusCode.INVALID_ARGUMENT

        drive(test)

    @pytest.mark.parametrize(
        "value",
        [
            None,
            "",
            "1",
            "one",
            "-1",
            "1.0",
            "9" * 5000,
            format_session(1)[:-1],
            f"{format_session(1)} 2",
            f"{'9' * 20}-{zlib.crc32(b'9' * 20):08x}",
            format_session(2).replace("2-", "1-"),
            format_session(0),
            format_session(10**18),
        ],
    )
    def test_a_stream_without_a_proper_session(self, value: str | None) -> None:
        """It may have been damaged on the way, into another's number too; so its worker is to join again."""

        async def test() -> None:
            async with serving() as served:
                ant, bee = await served.students()
                metadata = () if value is None else ((SESSION_KEY, value),)
                call = served.channel.stream_stream(EXCHANGE)(metadata=metadata)
                error = await error_of(call.read())
                assert error.code() is grpc.StatusCode.ABORTED
                assert SUPERSEDED_KEY not in dict(error.trailing_metadata())
                assert "session" in (error.details() or "")
                assert "join again" in (error.details() or "")
                for student in (ant, bee):
                    await student.contribute(contribution(served.experiment, student.name, 0))
                for student in (ant, bee):
                    assert await student.answer(), "and nobody's stream has ended"

        drive(test)

    @pytest.mark.parametrize("raw", [b"\xff\xff\xff", b"\x0a\xff", bytes(range(256))])
    def test_bytes_that_are_no_message(self, raw: bytes) -> None:
        async def test() -> None:
            async with serving() as served:
                for name, message in UNARY.items():
                    error = await error_of(served.channel.unary_unary(f"/codistill.v1.Distillation/{name}")(raw))
                    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
                    assert f"{len(raw)} bytes are not a {message.DESCRIPTOR.full_name}" in (error.details() or "")
                watch = served.channel.unary_stream("/codistill.v1.Distillation/WatchRun")(raw)
                assert (await error_of(watch.read())).code() is grpc.StatusCode.INVALID_ARGUMENT
                ant, _ = await served.students()
                await ant.write(as_sealed(raw, ant.session))
                assert (await ant.ending()).code() is grpc.StatusCode.INVALID_ARGUMENT
                assert served.presence == {"ant": "absent", "bee": "present"}
                assert served.failures == []

        drive(test)

    @pytest.mark.parametrize("damage", ["a bit", "the tail", "no checksum", "another session"])
    def test_a_damaged_contribution_is_sent_again_and_never_counted(self, damage: str) -> None:
        async def test() -> None:
            async with serving() as served:
                ant, bee = await served.students()
                message = contribution(served.experiment, "ant", 0)
                raw = append_checksum(message, str(ant.session))
                raw = {
                    "a bit": raw[:-40] + bytes([raw[-40] ^ 4]) + raw[-39:],
                    "the tail": raw[:-1],
                    "no checksum": message.SerializeToString(),
                    "another session": append_checksum(message, str(bee.session)),
                }[damage]
                await bee.send(0)
                await ant.write(raw)
                error = await ant.ending()
                assert error.code() is grpc.StatusCode.ABORTED
                assert "damaged on the way" in (error.details() or "")
                assert SUPERSEDED_KEY not in trailing(error), "it joins again"
                assert served.presence == {"ant": "absent", "bee": "present"}
                assert served.coordinator.frontier == 0
                assert served.coordinator.observations.rejected[Status.ABORTED] == 1
                events = served.coordinator.snapshot().events
                assert [event.student for event in events if event.kind == "damaged"] == ["ant"]
                ant = Student(served, "ant")
                await ant.start()
                await ant.send(0)
                assert await ant.answer() == await bee.answer()

        drive(test)

    @pytest.mark.parametrize("name", UNARY)
    def test_other_damaged_calls_are_to_be_tried_again(self, name: str) -> None:
        """Wherever the bit is, and whether the bytes still parse or not; nothing is done of what they say."""

        async def test() -> None:
            async with serving() as served:
                ant, _ = await served.students()
                request: Any = {
                    "Join": join_request(served.experiment, "ant"),
                    "Report": pb.ReportRequest(session=ant.session, round=3, durable_round=2),
                    "Leave": pb.LeaveRequest(session=ant.session, reason=pb.LEAVE_REASON_FINISHED, message="done"),
                }[name]
                raw = append_checksum(request)
                call = served.channel.unary_unary(f"/codistill.v1.Distillation/{name}")
                for position in range(0, len(raw) - 5, max(1, len(raw) // 30)):
                    damaged = bytearray(raw)
                    damaged[position] ^= 2
                    error = await error_of(call(bytes(damaged)))
                    assert error.code() is grpc.StatusCode.UNAVAILABLE, (position, error.details())
                    assert "damaged on the way" in (error.details() or "")
                assert served.presence == {"ant": "present", "bee": "present"}
                assert served.coordinator.observations.students["ant"].durable_round == 0
                await call(request.SerializeToString())  # without a checksum, as other programs may
                answer = await (call(raw) if name != "Leave" else error_of(call(raw)))
                if name == "Join":
                    assert verify_checksum(answer), "the response is sealed too"

        drive(test)

    def test_messages_larger_than_the_run_can_need(self) -> None:
        async def test() -> None:
            async with serving() as served:
                raw = bytes(receive_limit(served.experiment) + 1)
                error = await error_of(served.channel.unary_unary("/codistill.v1.Distillation/Join")(raw))
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                ant, _ = await served.students()
                await ant.write(raw)
                assert (await ant.ending()).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                await until(lambda: served.presence == {"ant": "absent", "bee": "present"})

        drive(test)


class _SlowHeaders:
    """A stream's context whose headers take their time, as on a busy machine."""

    def __init__(self, session: int) -> None:
        self._session = session
        self.sent: list[str] = []

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ((SESSION_KEY, format_session(self._session)),)

    async def send_initial_metadata(self, _: object) -> None:
        try:
            await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            self.sent.append("cancelled headers")
            raise
        self.sent.append("headers")


def test_headers_are_sent_in_full_when_the_caller_ends_its_stream_at_once() -> None:
    """Were they cancelled, gRPC could send no status either, and the caller would wait for it for ever."""

    async def nothing() -> AsyncGenerator[bytes]:
        return
        yield

    async def test() -> None:
        async with serving() as served:
            request = join_request(served.experiment, "ant")
            session = (await served.stub.Join(request)).session
            context = _SlowHeaders(session)
            await cast("Any", served.service)._exchange(nothing(), context)
            assert context.sent == ["headers"]
            assert served.presence["ant"] == "absent"

    drive(test)
