from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any, cast

import grpc
import grpc.aio
import pytest

from codistill.config.fingerprint import identity
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.channel import SESSION_KEY, SUPERSEDED_KEY
from codistill.wire.checksum import append_checksum, crc32c, format_session
from codistill.wire.times import duration
from codistill_server.coordinator import Coordinator
from codistill_server.observability.state import RunState
from codistill_server.rounds.actions import Status
from codistill_server.rpc import service
from codistill_server.rpc.service import DistillationService
from codistill_server.storage.journal import Journal
from server.rpc.support import (
    EXCHANGE,
    PATIENCE,
    Participant,
    drive,
    error_of,
    relay,
    serving,
    trailing,
    until,
    with_checksum,
)
from server.support import contribution, join_request, make_experiment


class TestStreams:
    def test_a_broken_connection_makes_the_participant_disconnected(self) -> None:
        async def test() -> None:
            async with serving() as served, relay(served.port) as (port, cut):
                bee = Participant(served, "bee")
                await bee.start()
                async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                    ant = Participant(served, "ant", channel)
                    await ant.start()
                    await ant.send(0)
                    cut()
                    await until(lambda: served.states["ant"] == "disconnected")
                    assert (await ant.ending()).code() is grpc.StatusCode.UNAVAILABLE
                assert served.states["bee"] == "connected"
                again = Participant(served, "ant")
                await again.start()
                await again.send(0)
                await bee.send(0)
                assert await again.answer() == await bee.answer()

        drive(test)

    def test_a_session_without_a_stream_is_ended(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(service, "_STREAM_GRACE", 0.2)

        async def test() -> None:
            async with serving() as served:
                await Participant(served, "bee").start()
                await served.stub.Join(join_request(served.experiment, "ant"))
                assert served.states["ant"] == "connected"
                await until(lambda: served.states["ant"] == "disconnected")
                assert served.states["bee"] == "connected"

        drive(test)

    def test_a_stream_that_is_given_up_at_once_leaves_no_session(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whether the server has seen the stream by then or not."""
        monkeypatch.setattr(service, "_STREAM_GRACE", 0.3)

        async def test() -> None:
            async with serving() as served:
                for hops in range(12):
                    session_id = (await served.stub.Join(join_request(served.experiment, "ant"))).session_id
                    call = served.channel.stream_stream(EXCHANGE)(metadata=((SESSION_KEY, format_session(session_id)),))
                    for _ in range(hops):
                        await asyncio.sleep(0)
                    call.cancel()
                    if hops % 4 == 3:
                        await until(lambda: served.states["ant"] == "disconnected")
                assert served.failures == []

        drive(test)

    def test_a_second_stream_of_a_session_takes_over(self) -> None:
        async def test() -> None:
            async with serving() as served:
                ant, bee = await served.participants()
                first = ant.call
                ant.call = served.channel.stream_stream(EXCHANGE)(
                    metadata=((SESSION_KEY, format_session(ant.session_id)),)
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
                ant, bee = await served.participants()
                for participant in (ant, bee):
                    await participant.send(0)
                for participant in (ant, bee):
                    await participant.answer()
                sent = served.coordinator.run_state.bytes_out
                asking = asyncio.create_task(_ask(ant))
                await until(lambda: served.states["ant"] == "disconnected")
                unread = served.coordinator.run_state.bytes_out - sent
                assert unread < 1000 * 4 * batch * classes
                await bee.send(0)
                await bee.answer()
                again = Participant(served, "ant")
                await again.start()
                await again.send(0)
                await again.answer()
                asking.cancel()
                await asyncio.wait([asking])

        async def _ask(participant: Participant) -> None:
            raw = append_checksum(contribution(experiment, participant.name, 0), str(participant.session_id))
            with contextlib.suppress(grpc.aio.AioRpcError):
                while True:
                    await participant.write(raw)

        drive(test)

    def test_the_servers_end_ends_every_stream(self) -> None:
        async def test() -> None:
            async with serving() as served:
                participants = await served.participants()
                await participants[0].send(0)
                watch = served.stub.WatchRun(pb.WatchRunRequest(interval=duration(60)))
                await watch.read()
                served.service.end()
                for participant in participants:
                    error = await participant.ending()
                    assert error.code() is grpc.StatusCode.UNAVAILABLE
                    assert "going down" in (error.details() or "")
                async with asyncio.timeout(PATIENCE):
                    while await watch.read() is not grpc.aio.EOF:
                        pass

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
            f"{'9' * 20}-{crc32c(b'9' * 20):08x}",
            format_session(2).replace("2-", "1-"),
            format_session(0),
            format_session(10**18),
        ],
    )
    def test_a_stream_without_a_proper_session(self, value: str | None) -> None:
        """It may have been damaged on the way, into another's number too; so its worker is to join again."""

        async def test() -> None:
            async with serving() as served:
                ant, bee = await served.participants()
                metadata = () if value is None else ((SESSION_KEY, value),)
                call = served.channel.stream_stream(EXCHANGE)(metadata=metadata)
                error = await error_of(call.read())
                assert error.code() is grpc.StatusCode.ABORTED
                assert SUPERSEDED_KEY not in dict(error.trailing_metadata())
                assert "session" in (error.details() or "")
                assert "join again" in (error.details() or "")
                for participant in (ant, bee):
                    await participant.contribute(contribution(served.experiment, participant.name, 0))
                for participant in (ant, bee):
                    assert await participant.answer(), "and nobody's stream has ended"

        drive(test)

    @pytest.mark.parametrize("damage", ["a bit", "the tail", "no checksum", "another session"])
    def test_a_damaged_contribution_is_sent_again_and_never_counted(self, damage: str) -> None:
        async def test() -> None:
            async with serving() as served:
                ant, bee = await served.participants()
                message = contribution(served.experiment, "ant", 0)
                raw = append_checksum(message, str(ant.session_id))
                raw = {
                    "a bit": raw[:-40] + bytes([raw[-40] ^ 4]) + raw[-39:],
                    "the tail": raw[:-1],
                    "no checksum": message.SerializeToString(),
                    "another session": append_checksum(message, str(bee.session_id)),
                }[damage]
                await bee.send(0)
                await ant.write(raw)
                error = await ant.ending()
                assert error.code() is grpc.StatusCode.ABORTED
                assert "damaged on the way" in (error.details() or "")
                assert SUPERSEDED_KEY not in trailing(error), "it joins again"
                assert served.states == {"ant": "disconnected", "bee": "connected"}
                assert served.coordinator.frontier == 0
                assert served.coordinator.run_state.rejected[Status.ABORTED] == 1
                events = served.coordinator.snapshot().events
                assert [event.participant for event in events if event.kind == pb.EVENT_KIND_DAMAGED] == ["ant"]
                ant = Participant(served, "ant")
                await ant.start()
                await ant.send(0)
                assert await ant.answer() == await bee.answer()

        drive(test)

    def test_headers_that_are_under_way_do_not_lose_the_status(self) -> None:
        """gRPC sends none then: the worker would be told UNKNOWN, and not what is wrong with what it sent."""

        class Context:
            headers = "not sent"
            told: grpc.StatusCode | None = None

            def __init__(self, session_id: int) -> None:
                self.session_id = session_id

            def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
                return ((SESSION_KEY, format_session(self.session_id)),)

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
            context = Context(coordinator.join(join_request(experiment, "ant")).session_id)

            async def requests() -> AsyncGenerator[bytes]:
                yield with_checksum(b"no message", context.session_id)

            with contextlib.suppress(asyncio.CancelledError):
                await DistillationService(coordinator, lambda _: None)._exchange(requests(), cast("Any", context))
            assert context.told is grpc.StatusCode.INVALID_ARGUMENT
            coordinator.close()

        drive(test)


class _SlowHeaders:
    """A stream's context whose headers take their time, as on a busy machine."""

    def __init__(self, session_id: int) -> None:
        self._session = session_id
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
            session_id = (await served.stub.Join(request)).session_id
            context = _SlowHeaders(session_id)
            await cast("Any", served.service)._exchange(nothing(), context)
            assert context.sent == ["headers"]
            assert served.states["ant"] == "disconnected"

    drive(test)
