"""Shared by the tests of the gRPC service: a run behind a real port, and its participants' sides of their sessions."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, cast

import grpc
import grpc.aio
import pytest

from codistill.config.experiment import Experiment
from codistill.config.fingerprint import identity
from codistill.config.methods import Distillation
from codistill.methods.aggregator import Aggregator
from codistill.rundir.records import Record
from codistill.v1 import distillation_pb2 as pb
from codistill.v1.distillation_pb2_grpc import DistillationServiceStub
from codistill.wire.channel import SESSION_KEY, server_options
from codistill.wire.checksum import append_checksum, crc32c, format_session
from codistill_server.admission.contributions import receive_limit
from codistill_server.coordinator import Coordinator
from codistill_server.observability.state import RunState
from codistill_server.rpc.quotas import Limits
from codistill_server.rpc.service import DistillationService
from codistill_server.rpc.submit import EventLoopSubmit
from codistill_server.storage.journal import Journal
from server.support import contribution, join_request, make_experiment

PATIENCE = 40.0
EXCHANGE = "/codistill.v1.DistillationService/Exchange"


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
        return DistillationServiceStub(self.channel)

    @property
    def states(self) -> dict[str, str]:
        return {name: state.value for name, state in self.coordinator.states.items()}

    async def participants(self) -> list[Participant]:
        """Have all participants join and open their streams."""
        made = [Participant(self, name) for name in self.experiment.names]
        await asyncio.gather(*(participant.start() for participant in made))
        return made

    async def close_rounds(self, participants: Sequence[Participant]) -> None:
        """Have every participant contribute to each round that is left, so that each may finish."""
        for number in range(self.coordinator.frontier, self.coordinator.run_state.total_rounds):
            for participant in participants:
                await participant.send(number)
            for participant in participants:
                await participant.answer()


@dataclass
class Participant:
    """A worker's side of a session, with messages as bytes."""

    served: Served
    name: str
    channel: grpc.aio.Channel | None = None
    session_id: int = 0
    call: Any = None

    async def start(self, first_round: int = 0) -> None:
        channel = self.channel or self.served.channel
        request = join_request(self.served.experiment, self.name, first_round)
        self.session_id = (await cast("Any", DistillationServiceStub(channel)).Join(request)).session_id
        self.call = channel.stream_stream(EXCHANGE)(metadata=((SESSION_KEY, format_session(self.session_id)),))
        await self.call.initial_metadata()

    async def send(self, number: int, **options: Any) -> None:
        await self.contribute(contribution(self.served.experiment, self.name, number, **options))

    async def contribute(self, message: pb.ExchangeRequest) -> None:
        await self.write(append_checksum(message, str(self.session_id)))

    async def write(self, raw: bytes) -> None:
        await self.call.write(raw)

    async def answer(self) -> bytes:
        """Return the next targets as they came."""
        async with asyncio.timeout(PATIENCE):
            while True:
                raw = await self.call.read()
                assert isinstance(raw, bytes), "the stream ended"
                reply = pb.ExchangeResponse.FromString(raw)
                if reply.HasField("targets"):
                    return raw

    async def ending(self) -> grpc.aio.AioRpcError:
        """Return how the stream ends."""
        try:
            while True:
                await self.answer()
        except grpc.aio.AioRpcError as error:
            return error


def with_checksum(raw: bytes, session_id: int) -> bytes:
    """Return bytes, whatever they are, with the checksum of a contribution."""
    return raw + b"\xa5\x06" + crc32c(str(session_id).encode() + raw).to_bytes(4, "little")


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
        RunState(experiment, list[Record]().append),
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


@contextlib.asynccontextmanager
async def relay(port: int) -> AsyncGenerator[tuple[int, Callable[[], None]]]:
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


def returning(aggregator: Aggregator) -> Callable[..., Aggregator]:
    """Return what takes the place of `methods.create`."""

    def create(distillation: Distillation, students: Sequence[str] = (), teachers: Sequence[str] = ()) -> Aggregator:
        del distillation, students, teachers
        return aggregator

    return create
