from __future__ import annotations

import asyncio
from typing import Any, cast

import grpc
import grpc.aio
import pytest

from codistill.v1 import distillation_pb2 as pb
from codistill.v1.distillation_pb2_grpc import DistillationServiceStub
from codistill.wire import channel
from codistill.wire.channel import SESSION_KEY, server_options
from codistill.wire.checksum import append_checksum, format_session
from codistill.wire.times import duration
from codistill_server.ratelimit import Rate
from codistill_server.rpc.quotas import Limits
from server.rpc.support import EXCHANGE, PATIENCE, Participant, drive, error_of, relay, serving, trailing, until
from server.support import contribution, join_request


class TestLimits:
    """One peer asks for more than its share; it is told, and the others notice nothing."""

    def test_a_session_that_asks_for_the_same_again_and_again(self) -> None:
        async def test() -> None:
            async with serving() as served:
                ant, bee = await served.participants()
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
                again = Participant(served, "ant")
                await again.start(1)
                await asyncio.gather(again.send(1), bee.send(1))
                assert await again.answer() == await bee.answer()

        drive(test)

    def test_a_participant_that_catches_up_at_full_speed_meets_none(self) -> None:
        async def test() -> None:
            async with serving() as served:
                ant, bee = await served.participants()
                for number in range(12):
                    await asyncio.gather(ant.send(number), bee.send(number))
                    await asyncio.gather(ant.answer(), bee.answer())
                for _ in range(20):
                    again = Participant(served, "ant")
                    await again.start()
                    for number in range(12):
                        await again.send(number)
                        await again.answer()
                assert served.failures == []

        drive(test)

    def test_joins_of_one_participant(self) -> None:
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
                assert kinds.count(pb.EVENT_KIND_REFUSED) == 2, (
                    "what the limit refuses leaves no event: nobody fills the disk"
                )

        drive(test)

    def test_calls_of_one_host(self) -> None:
        async def test() -> None:
            async with serving(limits=Limits(calls=Rate(5, 0.1))) as served:
                for _ in range(5):
                    await served.stub.GetRun(pb.GetRunRequest())
                async with grpc.aio.insecure_channel(f"127.0.0.1:{served.port}") as channel:
                    error = await error_of(cast("Any", DistillationServiceStub(channel)).GetRun(pb.GetRunRequest()))
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert str(error.details()).startswith("ipv4:127.0.0.1 makes more than 0.1 calls a second")

        drive(test)

    def test_bytes_of_one_host(self) -> None:
        async def test() -> None:
            async with serving(limits=Limits(call_bytes=Rate(1000, 1))) as served:
                junk = served.channel.unary_unary("/codistill.v1.DistillationService/Join")
                assert (await error_of(junk(bytes(1000)))).code() is grpc.StatusCode.INVALID_ARGUMENT
                assert (await error_of(junk(bytes(1000)))).code() is grpc.StatusCode.RESOURCE_EXHAUSTED

        drive(test)

    def test_watchers(self) -> None:
        async def test() -> None:
            async with serving(limits=Limits(watchers=3)) as served:
                request = pb.WatchRunRequest(interval=duration(60))
                for _ in range(5):  # whoever ends makes room
                    watching = [served.stub.WatchRun(request) for _ in range(3)]
                    for each in watching:
                        await each.read()
                    error = await error_of(served.stub.WatchRun(request).read())
                    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                    assert "3 WatchRun streams are open" in str(error.details())
                    for each in watching:
                        each.cancel()
                    quotas = served.service._quotas
                    await until(lambda quotas=quotas: quotas.watching == 0)

        drive(test)

    def test_a_watcher_that_does_not_read_makes_room_when_it_goes(self) -> None:
        async def test() -> None:
            async with (
                serving(limits=Limits(watchers=1)) as served,
                relay(served.port) as (port, cut),
                grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
            ):
                unread = cast("Any", DistillationServiceStub(channel)).WatchRun(
                    pb.WatchRunRequest(interval=duration(0.1))
                )
                await unread.initial_metadata()
                await until(lambda: served.service._quotas.watching == 1)
                cut()
                await until(lambda: served.service._quotas.watching == 0)

        drive(test)

    def test_one_exchange_stream_for_a_session(self) -> None:
        async def test() -> None:
            async with serving() as served:
                ant, bee = await served.participants()
                second = served.channel.stream_stream(EXCHANGE)(
                    metadata=((SESSION_KEY, format_session(ant.session_id)),)
                )
                await second.initial_metadata()
                error = await ant.ending()
                assert error.code() is grpc.StatusCode.ABORTED
                assert "has opened another stream" in str(error.details())
                await second.write(append_checksum(contribution(served.experiment, "ant", 0), str(ant.session_id)))
                await bee.send(0)
                assert await second.read() == await bee.answer()

        drive(test)

    def test_streams_of_one_connection(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(channel, "_STREAMS_PER_CONNECTION", 4)

        async def test() -> None:
            async with serving() as served:
                held = [served.stub.WatchRun(pb.WatchRunRequest(interval=duration(60))) for _ in range(4)]
                for each in held:
                    await each.read()
                error = await error_of(served.stub.GetRun(pb.GetRunRequest(), timeout=0.5))
                assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED, "the fifth waits for its turn"
                own = [("grpc.use_local_subchannel_pool", 1)]  # else both channels share one connection
                async with grpc.aio.insecure_channel(f"127.0.0.1:{served.port}", own) as channel:
                    await cast("Any", DistillationServiceStub(channel)).GetRun(pb.GetRunRequest(), timeout=PATIENCE)

        drive(test)

    @pytest.mark.parametrize("sent", [b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"], ids=["nothing", "half a greeting"])
    def test_a_connection_that_does_not_speak_is_closed(self, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(channel, "_HANDSHAKE_MS", 300)

        async def test() -> None:
            async with serving() as served, asyncio.timeout(PATIENCE):
                reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
                writer.write(sent)
                while await reader.read(1000):
                    pass
                writer.close()

        drive(test)

    def test_a_connection_without_a_call_is_closed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(channel, "_IDLE_MS", 1000)

        async def test() -> None:
            async with serving() as served, asyncio.timeout(PATIENCE):
                reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
                writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
                while await reader.read(1000):
                    pass
                writer.close()
                ant, bee = await served.participants()
                await asyncio.gather(ant.send(0), bee.send(0))
                assert await ant.answer() == await bee.answer()

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
