from __future__ import annotations

import asyncio
import contextlib

import grpc
import grpc.aio
import pytest

from codistill.v1 import distillation_pb2 as pb
from codistill.wire.channel import SESSION_KEY
from codistill.wire.checksum import append_checksum, format_session
from codistill_server.rpc import service
from server.rpc.support import EXCHANGE, PATIENCE, Student, drive, error_of, relay, serving, until
from server.support import contribution, join_request, make_experiment


class TestStreams:
    def test_a_broken_connection_makes_the_student_absent(self) -> None:
        async def test() -> None:
            async with serving() as served, relay(served.port) as (port, cut):
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
                    call = served.channel.stream_stream(EXCHANGE)(metadata=((SESSION_KEY, format_session(session)),))
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
                ant.call = served.channel.stream_stream(EXCHANGE)(
                    metadata=((SESSION_KEY, format_session(ant.session)),)
                )
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
            raw = append_checksum(contribution(experiment, student.name, 0), str(student.session))
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
