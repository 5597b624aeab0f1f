from __future__ import annotations

import asyncio
import contextlib
import threading
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import grpc
import grpc.aio
import pytest
import torch

from codistill import SESSION_KEY, SUPERSEDED_KEY
from codistill.checksums import is_whole, seal, seal_session
from codistill.distillation import Distillation
from codistill.experiment import Experiment
from codistill.identity import identity
from codistill.records import Record
from codistill.tensors import encode
from codistill.v1 import distillation_pb2 as pb
from codistill.v1.distillation_pb2_grpc import DistillationStub
from codistill_server import methods, service
from codistill_server.contributions import receive_limit
from codistill_server.coordinator import Coordinator
from codistill_server.journal import ClosedRound, Journal, JournalError
from codistill_server.limits import Limits, Rate
from codistill_server.observations import Observations
from codistill_server.round_events import Status
from codistill_server.service import DistillationService, EventLoopSubmit, server_options
from server.support_server import (
    BATCH,
    CLASSES,
    contribution,
    join_request,
    make_experiment,
)

PATIENCE = 40.0
EXCHANGE = "/codistill.v1.Distillation/Exchange"
UNARY = {"Join": pb.JoinRequest, "Report": pb.ReportRequest, "Leave": pb.LeaveRequest}


def drive(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 2 * PATIENCE))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0.01)


@dataclass
class Served:
    """A run behind a real port."""

    experiment: Experiment
    coordinator: Coordinator
    service: DistillationService
    server: grpc.aio.Server
    port: int
    failures: list[Exception]
    channel: grpc.aio.Channel

    @property
    def stub(self) -> Any:  # the generated types know blocking channels only
        return DistillationStub(self.channel)

    @property
    def presence(self) -> dict[str, str]:
        return {name: presence.value for name, presence in self.coordinator.presence.items()}

    async def students(self) -> list[Student]:
        """Has all students join and open their streams."""
        made = [Student(self, name) for name in self.experiment.names]
        await asyncio.gather(*(student.start() for student in made))
        return made


@dataclass
class Student:
    """A worker's side of a session, with messages as bytes."""

    served: Served
    name: str
    channel: grpc.aio.Channel | None = None
    session: int = 0
    call: Any = None

    async def start(self, first_round: int = 0) -> None:
        channel = self.channel or self.served.channel
        request = join_request(self.served.experiment, self.name, first_round)
        self.session = (await cast("Any", DistillationStub(channel)).Join(request)).session
        self.call = channel.stream_stream(EXCHANGE)(metadata=((SESSION_KEY, seal_session(self.session)),))
        await self.call.initial_metadata()

    async def send(self, number: int, **options: Any) -> None:
        await self.contribute(contribution(self.served.experiment, self.name, number, **options))

    async def contribute(self, message: pb.Contribution) -> None:
        await self.write(seal(message, str(self.session)))

    async def write(self, raw: bytes) -> None:
        await self.call.write(raw)

    async def answer(self) -> bytes:
        """Returns the next targets as they came."""
        async with asyncio.timeout(PATIENCE):
            while True:
                raw = await self.call.read()
                assert isinstance(raw, bytes), "the stream ended"
                reply = pb.ExchangeReply.FromString(raw)
                if reply.HasField("targets"):
                    return raw

    async def ending(self) -> grpc.aio.AioRpcError:
        """Returns how the stream ends."""
        try:
            while True:
                await self.answer()
        except grpc.aio.AioRpcError as error:
            return error


def as_sealed(raw: bytes, session: int) -> bytes:
    """Returns bytes, whatever they are, with the checksum of a contribution."""
    return raw + b"\x7d" + zlib.crc32(str(session).encode() + raw).to_bytes(4, "little")


@contextlib.asynccontextmanager
async def serving(
    experiment: Experiment | None = None, journal: Journal | None = None, limits: Limits | None = None
) -> AsyncGenerator[Served]:
    experiment = experiment or make_experiment()
    failures: list[Exception] = []
    submit = EventLoopSubmit(failures.append)
    coordinator = Coordinator(
        experiment,
        journal or Journal(None, identity(experiment)),
        Observations(experiment, list[Record]().append),
        submit,
    )
    made = DistillationService(coordinator, failures.append, limits)
    server = grpc.aio.server(options=server_options(receive_limit(experiment)))
    server.add_generic_rpc_handlers((made.handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    ticking = asyncio.create_task(made.tick())
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Served(experiment, coordinator, made, server, port, failures, channel)
    finally:
        ticking.cancel()
        made.end()
        await server.stop(2)
        submit.close()
        coordinator.close()


async def error_of(call: Awaitable[object]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def trailing(error: grpc.aio.AioRpcError) -> dict[str, str | bytes]:
    return dict(error.trailing_metadata() or ())


class TestRounds:
    def test_eight_students_get_the_same_bytes(self) -> None:
        async def test() -> None:
            async with serving(make_experiment([f"s{number}" for number in range(8)])) as served:
                students = await served.students()
                for number in range(12):
                    await asyncio.gather(*(student.send(number) for student in students))
                    answers = await asyncio.gather(*(student.answer() for student in students))
                    assert len(set(answers)) == 1
                    assert pb.ExchangeReply.FromString(answers[0]).targets.round == number
                assert served.coordinator.frontier == 12

        drive(test)

    def test_a_student_that_comes_back_is_answered_from_the_journal(self) -> None:
        async def test() -> None:
            async with serving() as served:
                ant, bee = await served.students()
                answers: list[bytes] = []
                for number in range(7):
                    await asyncio.gather(ant.send(number), bee.send(number))
                    answers.append(await ant.answer())
                ant.call.cancel()
                await until(lambda: served.presence["ant"] == "absent")
                again = Student(served, "ant")
                await again.start(2)
                for number in range(2, 7):
                    await again.send(number)
                assert [await again.answer() for _ in range(5)] == answers[2:]

        drive(test)

    def test_who_waits_is_told_whom_for(self) -> None:
        async def test() -> None:
            async with serving(make_experiment(exchange={"waiting_notice": 0.3})) as served:
                ant, bee = await served.students()
                await ant.send(0)
                raw = await ant.call.read()
                waiting = pb.ExchangeReply.FromString(raw).waiting
                assert (waiting.round, list(waiting.students)) == (0, ["bee"])
                assert waiting.seconds >= 0.3
                run = await served.stub.GetRun(pb.GetRunRequest())
                assert list(run.waiting_for) == ["bee"]
                await bee.send(0)
                assert await ant.answer() == await bee.answer()

        drive(test)

    def test_a_student_that_finished_is_reported_and_completes_the_run(self) -> None:
        async def test() -> None:
            async with serving(make_experiment()) as served:
                ant, bee = await served.students()
                await served.stub.Report(pb.ReportRequest(session=ant.session, round=3, epoch=1, durable_round=0))
                run = await served.stub.GetRun(pb.GetRunRequest())
                assert [(student.name, student.round) for student in run.students] == [("ant", 3), ("bee", 0)]
                for student in (ant, bee):
                    assert not served.coordinator.complete
                    leave = pb.LeaveRequest(session=student.session, reason=pb.LEAVE_REASON_FINISHED)
                    await served.stub.Leave(leave)
                    student.call.cancel()
                assert served.coordinator.complete

        drive(test)


class TestHeavyWork:
    @pytest.mark.parametrize("ensemble", ["linear", "min_logit"])
    def test_linear_is_made_beside_the_loop(self, monkeypatch: pytest.MonkeyPatch, ensemble: str) -> None:
        """Its targets are held back: meanwhile the server answers. Lighter ensembles are made on the loop's thread."""
        experiment = make_experiment(distillation={"ensemble": ensemble})
        half = methods.create(experiment.distillation)
        assert half is not None
        release, threads = threading.Event(), list[str]()

        class Held:
            heavy, student, teacher = half.heavy, half.student, half.teacher

            def targets(self, gathered: methods.Gathered) -> methods.Targets:
                threads.append(threading.current_thread().name)
                assert release.wait(PATIENCE)
                return half.targets(gathered)

        monkeypatch.setattr(methods, "create", _returning(Held()))
        if not half.heavy:
            release.set()

        async def test() -> None:
            async with serving(experiment) as served:
                students = await served.students()
                for student in students:
                    await student.send(0)
                if half.heavy:
                    await until(lambda: len(threads) == 1)
                    run = await asyncio.wait_for(served.stub.GetRun(pb.GetRunRequest()), PATIENCE)
                    assert run.frontier == 0
                    release.set()
                answers = {await student.answer() for student in students}
                assert len(answers) == 1

        drive(test)
        (thread,) = threads
        assert thread.startswith("codistill-targets") == half.heavy

    def test_a_real_linear_round(self) -> None:
        async def test() -> None:
            async with serving(make_experiment(distillation={"ensemble": "linear"})) as served:
                students = await served.students()
                for number in range(3):
                    await asyncio.gather(*(student.send(number) for student in students))
                    assert len({await student.answer() for student in students}) == 1
                assert served.failures == []

        drive(test)


class TestStatus:
    def test_headers_that_are_under_way_do_not_lose_the_status(self) -> None:
        """gRPC sends none then: the worker would be told UNKNOWN, and not what is wrong with what it sent."""

        class Context:
            headers = "not sent"
            told: grpc.StatusCode | None = None

            def __init__(self, session: int) -> None:
                self.session = session

            def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
                return ((SESSION_KEY, seal_session(self.session)),)

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
            coordinator = Coordinator(experiment, journal, Observations(experiment, lambda _: None))
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
            seal_session(1)[:-1],
            f"{seal_session(1)} 2",
            f"{'9' * 20}-{zlib.crc32(b'9' * 20):08x}",
            seal_session(2).replace("2-", "1-"),
            seal_session(0),
            seal_session(10**18),
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
                raw = seal(message, str(ant.session))
                raw = {
                    "a bit": raw[:-40] + bytes([raw[-40] ^ 4]) + raw[-39:],
                    "the tail": raw[:-1],
                    "no checksum": message.SerializeToString(),
                    "another session": seal(message, str(bee.session)),
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
                raw = seal(request)
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
                    assert is_whole(answer), "the response is sealed too"

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


class TestLimits:
    """One peer asks for more than its share; it is told, and the others notice nothing."""

    def test_a_session_that_asks_for_the_same_again_and_again(self) -> None:
        async def test() -> None:
            async with serving() as served:
                ant, bee = await served.students()
                await asyncio.gather(ant.send(0), bee.send(0))
                await asyncio.gather(ant.answer(), bee.answer())
                for _ in range(64):
                    await ant.send(0)
                    await ant.answer()
                await ant.send(0)
                error = await ant.ending()
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert "round 0: this session has contributed to it before" in str(error.details())
                assert 1 <= int(trailing(error)["grpc-retry-pushback-ms"]) <= 1000
                again = Student(served, "ant")
                await again.start(1)
                await asyncio.gather(again.send(1), bee.send(1))
                assert await again.answer() == await bee.answer()

        drive(test)

    def test_a_student_that_catches_up_at_full_speed_meets_none(self) -> None:
        async def test() -> None:
            async with serving() as served:
                ant, bee = await served.students()
                for number in range(12):
                    await asyncio.gather(ant.send(number), bee.send(number))
                    await asyncio.gather(ant.answer(), bee.answer())
                for _ in range(20):
                    again = Student(served, "ant")
                    await again.start()
                    for number in range(12):
                        await again.send(number)
                        await again.answer()
                assert served.failures == []

        drive(test)

    def test_joins_of_one_student(self) -> None:
        async def test() -> None:
            async with serving(limits=Limits(joins=Rate(2, 0.1))) as served:
                for name in ("ant", "nobody"):
                    for _ in range(2):
                        await asyncio.gather(
                            served.stub.Join(join_request(served.experiment, name)), return_exceptions=True
                        )
                    error = await error_of(served.stub.Join(join_request(served.experiment, name)))
                    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                    assert "more than 0.1 joins a second" in str(error.details())
                    assert 9_000 <= int(trailing(error)["grpc-retry-pushback-ms"]) <= 10_000
                error = await error_of(served.stub.Join(join_request(served.experiment, "another")))
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, "made-up names have one share in all"
                await served.stub.Join(join_request(served.experiment, "bee"))
                kinds = [event.kind for event in served.coordinator.snapshot().events]
                assert kinds.count("refused") == 2, "what the limit refuses leaves no event: nobody fills the disk"

        drive(test)

    def test_calls_of_one_host(self) -> None:
        async def test() -> None:
            async with serving(limits=Limits(calls=Rate(5, 0.1))) as served:
                for _ in range(5):
                    await served.stub.GetRun(pb.GetRunRequest())
                async with grpc.aio.insecure_channel(f"127.0.0.1:{served.port}") as channel:
                    error = await error_of(cast("Any", DistillationStub(channel)).GetRun(pb.GetRunRequest()))
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert str(error.details()).startswith("ipv4:127.0.0.1 makes more than 0.1 calls a second")

        drive(test)

    def test_bytes_of_one_host(self) -> None:
        async def test() -> None:
            async with serving(limits=Limits(call_bytes=Rate(1000, 1))) as served:
                junk = served.channel.unary_unary("/codistill.v1.Distillation/Join")
                assert (await error_of(junk(bytes(1000)))).code() is grpc.StatusCode.INVALID_ARGUMENT
                assert (await error_of(junk(bytes(1000)))).code() is grpc.StatusCode.RESOURCE_EXHAUSTED

        drive(test)

    def test_watchers(self) -> None:
        async def test() -> None:
            async with serving(limits=Limits(watchers=3)) as served:
                request = pb.WatchRunRequest(interval_seconds=60)
                for _ in range(5):  # whoever ends makes room
                    watching = [served.stub.WatchRun(request) for _ in range(3)]
                    for each in watching:
                        await each.read()
                    error = await error_of(served.stub.WatchRun(request).read())
                    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                    assert "3 WatchRun streams are open" in str(error.details())
                    for each in watching:
                        each.cancel()
                    gate = served.service._gate
                    await until(lambda gate=gate: gate.watching == 0)

        drive(test)

    def test_a_watcher_that_does_not_read_makes_room_when_it_goes(self) -> None:
        async def test() -> None:
            async with (
                serving(limits=Limits(watchers=1)) as served,
                _relay(served.port) as (port, cut),
                grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
            ):
                unread = cast("Any", DistillationStub(channel)).WatchRun(pb.WatchRunRequest(interval_seconds=0.1))
                await unread.initial_metadata()
                await until(lambda: served.service._gate.watching == 1)
                cut()
                await until(lambda: served.service._gate.watching == 0)

        drive(test)

    def test_one_exchange_stream_for_a_session(self) -> None:
        async def test() -> None:
            async with serving() as served:
                ant, bee = await served.students()
                second = served.channel.stream_stream(EXCHANGE)(metadata=((SESSION_KEY, seal_session(ant.session)),))
                await second.initial_metadata()
                error = await ant.ending()
                assert error.code() is grpc.StatusCode.ABORTED
                assert "has opened another stream" in str(error.details())
                await second.write(seal(contribution(served.experiment, "ant", 0), str(ant.session)))
                await bee.send(0)
                assert await second.read() == await bee.answer()

        drive(test)

    def test_streams_of_one_connection(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(service, "_STREAMS_PER_CONNECTION", 4)

        async def test() -> None:
            async with serving() as served:
                held = [served.stub.WatchRun(pb.WatchRunRequest(interval_seconds=60)) for _ in range(4)]
                for each in held:
                    await each.read()
                error = await error_of(served.stub.GetRun(pb.GetRunRequest(), timeout=0.5))
                assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED, "the fifth waits for its turn"
                own = [("grpc.use_local_subchannel_pool", 1)]  # else both channels share one connection
                async with grpc.aio.insecure_channel(f"127.0.0.1:{served.port}", own) as channel:
                    await cast("Any", DistillationStub(channel)).GetRun(pb.GetRunRequest(), timeout=PATIENCE)

        drive(test)

    @pytest.mark.parametrize("sent", [b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"], ids=["nothing", "half a greeting"])
    def test_a_connection_that_does_not_speak_is_closed(self, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(service, "_HANDSHAKE_MS", 300)

        async def test() -> None:
            async with serving() as served, asyncio.timeout(PATIENCE):
                reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
                writer.write(sent)
                while await reader.read(1000):
                    pass
                writer.close()

        drive(test)

    def test_a_connection_without_a_call_is_closed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(service, "_IDLE_MS", 1000)

        async def test() -> None:
            async with serving() as served, asyncio.timeout(PATIENCE):
                reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
                writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
                while await reader.read(1000):
                    pass
                writer.close()
                ant, bee = await served.students()
                await asyncio.gather(ant.send(0), bee.send(0))
                assert await ant.answer() == await bee.answer()

        drive(test)


class TestStreams:
    def test_a_broken_connection_makes_the_student_absent(self) -> None:
        async def test() -> None:
            async with serving() as served, _relay(served.port) as (port, cut):
                bee = Student(served, "bee")
                await bee.start()
                async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                    ant = Student(served, "ant", channel)
                    await ant.start()
                    await ant.send(0)
                    cut()
                    await until(lambda: served.presence["ant"] == "absent")
                    assert (await ant.ending()).code() is grpc.StatusCode.UNAVAILABLE
                assert served.presence["bee"] == "present"
                again = Student(served, "ant")
                await again.start()
                await again.send(0)
                await bee.send(0)
                assert await again.answer() == await bee.answer()

        drive(test)

    def test_a_session_without_a_stream_is_ended(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(service, "_STREAM_GRACE", 0.2)

        async def test() -> None:
            async with serving() as served:
                await Student(served, "bee").start()
                await served.stub.Join(join_request(served.experiment, "ant"))
                assert served.presence["ant"] == "present"
                await until(lambda: served.presence["ant"] == "absent")
                assert served.presence["bee"] == "present"

        drive(test)

    def test_a_stream_that_is_given_up_at_once_leaves_no_session(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whether the server has seen the stream by then or not."""
        monkeypatch.setattr(service, "_STREAM_GRACE", 0.3)

        async def test() -> None:
            async with serving() as served:
                for hops in range(12):
                    session = (await served.stub.Join(join_request(served.experiment, "ant"))).session
                    call = served.channel.stream_stream(EXCHANGE)(metadata=((SESSION_KEY, seal_session(session)),))
                    for _ in range(hops):
                        await asyncio.sleep(0)
                    call.cancel()
                    if hops % 4 == 3:
                        await until(lambda: served.presence["ant"] == "absent")
                assert served.failures == []

        drive(test)

    def test_a_second_stream_of_a_session_takes_over(self) -> None:
        async def test() -> None:
            async with serving() as served:
                ant, bee = await served.students()
                first = ant.call
                ant.call = served.channel.stream_stream(EXCHANGE)(metadata=((SESSION_KEY, seal_session(ant.session)),))
                await ant.call.initial_metadata()
                error = await error_of(first.read())
                assert error.code() is grpc.StatusCode.ABORTED
                await ant.send(0)
                await bee.send(0)
                assert await ant.answer() == await bee.answer()

        drive(test)

    def test_a_reader_that_does_not_read_is_cut_off(self) -> None:
        """It asks for a closed round over and over; what it does not read is bounded, and the others do not notice."""
        batch, classes = 64, 1000
        experiment = make_experiment(data={"classes": classes}, training={"batch_size": batch})

        async def test() -> None:
            async with serving(experiment) as served:
                ant, bee = await served.students()
                for student in (ant, bee):
                    await student.send(0)
                for student in (ant, bee):
                    await student.answer()
                sent = served.coordinator.observations.bytes_out
                asking = asyncio.create_task(_ask(ant))
                await until(lambda: served.presence["ant"] == "absent")
                unread = served.coordinator.observations.bytes_out - sent
                assert unread < 1000 * 4 * batch * classes
                await bee.send(0)
                await bee.answer()
                again = Student(served, "ant")
                await again.start()
                await again.send(0)
                await again.answer()
                asking.cancel()
                await asyncio.wait([asking])

        async def _ask(student: Student) -> None:
            raw = seal(contribution(experiment, student.name, 0), str(student.session))
            with contextlib.suppress(grpc.aio.AioRpcError):
                while True:
                    await student.write(raw)

        drive(test)

    def test_the_servers_end_ends_every_stream(self) -> None:
        async def test() -> None:
            async with serving() as served:
                students = await served.students()
                await students[0].send(0)
                watch = served.stub.WatchRun(pb.WatchRunRequest(interval_seconds=60))
                await watch.read()
                served.service.end()
                for student in students:
                    error = await student.ending()
                    assert error.code() is grpc.StatusCode.UNAVAILABLE
                    assert "going down" in (error.details() or "")
                async with asyncio.timeout(PATIENCE):
                    while await watch.read() is not grpc.aio.EOF:
                        pass

        drive(test)


class TestConnections:
    def test_one_that_says_nothing_is_closed(self) -> None:
        """gRPC alone would hold it for two minutes; the limit is made short here."""
        options = dict(server_options(1000))
        assert options["grpc.server_handshake_timeout_ms"] <= 10_000
        options["grpc.server_handshake_timeout_ms"] = 200

        async def test() -> None:
            server = grpc.aio.server(options=list(options.items()))
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            async with asyncio.timeout(PATIENCE):
                while await reader.read(1000):
                    pass
            writer.close()
            await server.stop(0)

        drive(test)


class TestWatchRun:
    @pytest.mark.parametrize("interval", [0.05, 61.0, -1.0, float("nan"), float("inf")])
    def test_an_interval_that_is_not_allowed(self, interval: float) -> None:
        async def test() -> None:
            async with serving() as served:
                call = served.stub.WatchRun(pb.WatchRunRequest(interval_seconds=interval))
                error = await error_of(call.read())
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert f"interval_seconds: {interval} is not allowed; allowed: 0.1 to 60" in (error.details() or "")

        drive(test)

    @pytest.mark.parametrize("interval", [0.0, 0.1])
    def test_it_goes_on_until_the_run_is_complete(self, interval: float) -> None:
        async def test() -> None:
            async with serving() as served:
                call = served.stub.WatchRun(pb.WatchRunRequest(interval_seconds=interval))
                assert not (await call.read()).complete
                for student in await served.students():
                    await served.stub.Leave(pb.LeaveRequest(session=student.session, reason=pb.LEAVE_REASON_FINISHED))
                async with asyncio.timeout(PATIENCE):
                    states = []
                    while (state := await call.read()) is not grpc.aio.EOF:
                        states.append(state.complete)
                assert states[-1]
                assert not any(states[:-1])

        drive(test)

    def test_a_watcher_that_goes_away_is_let_go(self) -> None:
        async def test() -> None:
            async with serving() as served:
                before = len(asyncio.all_tasks())
                calls = [served.stub.WatchRun(pb.WatchRunRequest(interval_seconds=0.1)) for _ in range(5)]
                for call in calls:
                    await call.read()
                while calls:
                    calls.pop().cancel()
                await until(lambda: len(asyncio.all_tasks()) <= before)

        drive(test)


def _returning(half: methods.ServerHalf) -> Callable[..., methods.ServerHalf]:
    def create(
        distillation: Distillation, students: Sequence[str] = (), teachers: Sequence[str] = ()
    ) -> methods.ServerHalf:
        del distillation, students, teachers
        return half

    return create


class _BrokenJournal(Journal):
    def append(self, closed: ClosedRound) -> None:
        del closed
        raise JournalError("the disk is full")


class TestFaults:
    @pytest.mark.parametrize("ensemble", ["linear", "min_logit"])
    def test_a_round_that_cannot_be_written_ends_the_run(self, ensemble: str) -> None:
        experiment = make_experiment(distillation={"ensemble": ensemble})

        async def test() -> None:
            async with serving(experiment, _BrokenJournal(None, identity(experiment))) as served:
                students = await served.students()
                for student in students:
                    await student.send(0)
                await until(lambda: bool(served.failures))
                assert [str(failure) for failure in served.failures] == ["the disk is full"]
                served.service.end()  # as the process does on a failure
                for student in students:
                    assert (await student.ending()).code() is grpc.StatusCode.UNAVAILABLE

        drive(test)

    def test_so_does_one_that_its_deadline_closes(self) -> None:
        """Were the ticks to end unnoticed, no deadline would ever close a round again."""
        experiment = make_experiment(
            distillation={"ensemble": "min_logit"}, exchange={"on_absence": "proceed", "round_deadline": 0.2}
        )

        async def test() -> None:
            async with serving(experiment, _BrokenJournal(None, identity(experiment))) as served:
                first, _ = await served.students()
                await first.send(0)
                await until(lambda: bool(served.failures))
                assert [str(failure) for failure in served.failures] == ["the disk is full"]
                assert (await first.ending()).code() is grpc.StatusCode.UNAVAILABLE

        drive(test)

    @pytest.mark.parametrize("goes", ["Leave", "Join"])
    def test_so_does_a_fault_in_a_call_that_closes_a_round(self, goes: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The round is half decided; were the server to go on, it would never close."""
        experiment = make_experiment(
            distillation={"ensemble": "min_logit"}, exchange={"on_absence": "proceed", "evict_after": 30}
        )

        async def test() -> None:
            async with serving(experiment) as served:
                first, second = await served.students()

                def fault(record: object) -> None:
                    raise ZeroDivisionError("a fault of ours")

                monkeypatch.setattr(served.coordinator._journal, "append", fault)
                monkeypatch.setattr(served.coordinator._journal, "remember", fault)
                await first.send(0)
                await until(lambda: served.coordinator.snapshot().waiting_for == ["bee"])
                if goes == "Leave":
                    call = served.stub.Leave(pb.LeaveRequest(session=second.session, reason=pb.LEAVE_REASON_STOPPED))
                else:
                    call = served.stub.Join(join_request(experiment, "bee"))
                error = await error_of(call)
                assert error.code() is grpc.StatusCode.UNAVAILABLE
                assert "going down" in (error.details() or "")
                assert [str(failure) for failure in served.failures] == ["a fault of ours"]
                assert (await first.ending()).code() is grpc.StatusCode.UNAVAILABLE

        drive(test)

    @pytest.mark.parametrize("heavy", [True, False])
    def test_so_does_any_other_fault_in_making_targets(self, monkeypatch: pytest.MonkeyPatch, heavy: bool) -> None:
        """Nobody is left to wait for a round that cannot be decided."""

        class Broken:
            student: ClassVar = {"logits": methods.LOGITS}
            teacher: ClassVar = {}

            def __init__(self) -> None:
                self.heavy = heavy

            def targets(self, gathered: methods.Gathered) -> methods.Targets:
                del gathered
                raise ZeroDivisionError("a fault of the method")

        monkeypatch.setattr(methods, "create", _returning(Broken()))

        async def test() -> None:
            async with serving() as served:
                for student in await served.students():
                    await student.send(0)
                await until(lambda: bool(served.failures))
                assert [type(failure) for failure in served.failures] == [ZeroDivisionError]

        drive(test)

    def test_a_journal_that_fails_at_a_join(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(record: object) -> None:
            raise JournalError("the disk is full")

        async def test() -> None:
            async with serving() as served:
                monkeypatch.setattr(served.coordinator._journal, "remember", full)
                error = await error_of(served.stub.Join(join_request(served.experiment, "ant")))
                assert error.code() is grpc.StatusCode.UNAVAILABLE
                assert "the disk is full" in (error.details() or "")
                assert [str(failure) for failure in served.failures] == ["the disk is full"]

        drive(test)


@contextlib.asynccontextmanager
async def _relay(port: int) -> AsyncGenerator[tuple[int, Callable[[], None]]]:
    """A port that leads to another, and how to cut all its connections without a word."""
    writers: list[asyncio.StreamWriter] = []
    tasks: set[asyncio.Task[None]] = set()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward_reader, onward_writer = await asyncio.open_connection("127.0.0.1", port)
        writers.extend((writer, onward_writer))
        tasks.update(asyncio.create_task(copy(*pair)) for pair in ((reader, onward_writer), (onward_reader, writer)))

    def cut() -> None:
        relay.close()
        for writer in writers:
            writer.transport.abort()

    relay = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield relay.sockets[0].getsockname()[1], cut
    finally:
        cut()
        if tasks:
            await asyncio.wait(tasks)


class _SlowHeaders:
    """A stream's context whose headers take their time, as on a busy machine."""

    def __init__(self, session: int) -> None:
        self._session = session
        self.sent: list[str] = []

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ((SESSION_KEY, seal_session(self._session)),)

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
