"""Scenarios: a fuzzer with students of its own in a run of its own, and a model that says what must happen at each step."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import grpc.aio

from codistill.v1 import distillation_pb2 as pb
from codistill.wire.channel import SESSION_KEY, SUPERSEDED_KEY
from codistill.wire.checksum import append_checksum, format_session
from codistill.wire.tensors import encode
from codistill_server.admission.contributions import receive_limit
from codistill_server.rpc.quotas import Limits
from fuzz import calls, generators, healthy_peers
from fuzz.calls import PATIENCE, PREFIX, Answer, Call, WrongError, check, locked_out
from fuzz.endpoints import Endpoint
from fuzz.healthy_peers import TRAIN_SAMPLES
from fuzz.oracle import OK, Code, ExpectedAnswer, Model, Published, refusal
from server.support import contribution, join_request, logits_of


class ScenarioRunner:
    """Plays scenarios with one server, one after the other.

    At a server that asks for a token, half of the calls are made once without it before: that may change nothing.

    Args:
        endpoint: the server.
        model: its run; the runner is its only client.
        traffic: real messages of a run of the same experiment.
        seen: counts steps by (kind, status).
        received: returns how many bytes of contributions the run has gone through.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        model: Model,
        traffic: Sequence[tuple[str, bytes]],
        seen: Counter[tuple[str, str]],
        received: Callable[[], int],
    ) -> None:
        self._endpoint = endpoint
        self._model = model
        self._limit = receive_limit(model.experiment)
        self._traffic = traffic
        self._raw = [raw for _, raw in traffic]
        self._seen = seen
        self._received = received
        self._channel: grpc.aio.Channel | None = None
        self._streams: dict[int, Any] = {}
        self._dead: list[int] = []
        self.steps: list[str] = []

    async def catch_up(self) -> None:
        """Start from the run as it is: rounds that others have closed, sessions that are over."""
        async with self._endpoint.channel() as channel:
            while True:  # what they had under way has come in once the server knows that they are gone
                answer = await calls.make(self._endpoint, channel, Call("GetRun", f"{PREFIX}GetRun", [b""], OK))
                run = pb.GetRunResponse.FromString(answer.replies[0]).run
                if all(each.state != pb.PARTICIPANT_STATE_CONNECTED for each in run.participants):
                    break
                await asyncio.sleep(0.01)
        model = self._model
        model.frontier = run.frontier
        model.durable = {each.name: each.durable_round for each in run.participants}
        model.oldest = min(model.durable.values())
        for number in range(model.oldest, model.frontier):
            model.closed[number] = (
                self._published(model.experiment.names[0], number),
                healthy_peers.targets(model.experiment, number),
            )
        if run.waiting_for:  # the last of them had published in the open round before they went
            others = set(model.experiment.names) - set(run.waiting_for)
            model.open = {name: self._published(name, model.frontier) for name in others}

    def _published(self, student: str, number: int) -> Published:
        batch = contribution(self._model.experiment, student, number).batch
        return Published(batch.ids.data, batch.labels.data, batch.outputs["logits"].data)

    async def run(self, rng: random.Random) -> None:
        """Play one scenario; at its end every session has said goodbye.

        Raises:
            WrongError: the server did not do what the model says; `steps` holds what led to it.
        """
        self.steps.clear()
        self._channel = self._endpoint.channel()
        try:
            for name in self._model.experiment.names:
                await self._join(rng, name)
            for _ in range(rng.randrange(5, 25)):
                await self._step(rng)
            for session_id in list(self._model.sessions):
                goodbye = pb.LeaveRequest(session_id=session_id, reason=pb.LEAVE_REASON_STOPPED)
                await self._leave(rng, goodbye.SerializeToString())
        finally:
            for stream in self._streams.values():
                stream.cancel()
            self._streams.clear()
            await self._channel.close()

    async def _step(self, rng: random.Random) -> None:
        live = list(self._streams)
        names = self._model.experiment.names
        match rng.randrange(16):
            case 0 | 1:
                await self._join(rng, rng.choice(names))
            case 2:
                rpc, raw = rng.choice([each for each in self._traffic if each[0] == "Join"])
                await self._raw_join(rng, generators.mutate(rng, raw, self._raw), rpc)
            case 3:
                await self._report(rng)
            case 4:
                session_id = self._any_session(rng)
                leave = generators.fill(rng, pb.LeaveRequest())
                leave.session_id = session_id
                await self._leave(rng, leave.SerializeToString())
            case 5:
                await self._open(rng, self._any_session(rng))
            case 6 if live:
                await self._hang_up(rng, rng.choice(live))
            case 7 if live:
                await self._contribute(rng, rng.choice(live), self._spoilt(rng))
            case 8 if live:
                await self._contribute(rng, rng.choice(live), self._lie(rng))
            case 9 if live and self._model.closed and rng.random() < 0.1:
                await self._insist(rng.choice(live))
            case 9 if live and self._model.frontier:
                number = rng.randrange(max(0, self._model.oldest - 1), self._model.frontier)
                await self._contribute(rng, rng.choice(live), self._honest(rng, number))
            case _ if live:
                await self._contribute(rng, rng.choice(live), self._honest(rng, self._model.frontier))
            case _:
                await self._join(rng, rng.choice(names))

    # Steps

    async def _join(self, rng: random.Random, student: str) -> None:
        first_round = rng.randint(self._model.oldest, self._model.frontier)
        request = join_request(self._model.experiment, student, first_round, data__train_samples=TRAIN_SAMPLES)
        request.device = generators.text(rng)
        request.parameters = generators.number(rng)
        await self._raw_join(rng, request.SerializeToString(), "Join")

    async def _raw_join(self, rng: random.Random, raw: bytes, rpc: str) -> None:
        answer = await self._unary(rng, "Join", raw, self._model.unary("Join", raw))
        if answer.code is Code.OK:
            session_id = pb.JoinResponse.FromString(answer.replies[0]).session_id
            older = self._model.joined(raw, session_id)
            if older is not None:
                await self._ended(older, "superseded", refusal(Code.ABORTED, "newer worker"), superseded=True)
            if rng.random() < 0.95:
                await self._open(rng, session_id)

    async def _report(self, rng: random.Random) -> None:
        report = pb.ReportRequest()
        if rng.random() < 0.5:
            generators.fill(rng, report)
        report.session_id = self._any_session(rng)
        if rng.random() < 0.5:
            report.durable_round = rng.randint(self._model.oldest, self._model.frontier + 1)
            report.round = max(0, report.durable_round + rng.choice((0, 0, 1, -1)))
        raw = report.SerializeToString()
        if (await self._unary(rng, "Report", raw, self._model.unary("Report", raw))).code is Code.OK:
            self._model.reported(raw)

    async def _leave(self, rng: random.Random, raw: bytes) -> None:
        if (await self._unary(rng, "Leave", raw, self._model.unary("Leave", raw))).code is Code.OK:
            session_id = self._model.left(raw)
            stream = self._streams.pop(session_id, None)
            self._dead.append(session_id)
            if stream is not None:
                stream.cancel()

    async def _open(self, rng: random.Random, session_id: int) -> None:
        self._note("open", str(session_id))
        assert self._channel is not None
        named = (SESSION_KEY, format_session(session_id))
        await self._knock(rng, Call("open", f"{PREFIX}Exchange", [], OK, [named]))
        metadata = (named, *self._endpoint.metadata)
        stream: Any = self._channel.stream_stream(f"{PREFIX}Exchange")(metadata=metadata, timeout=300)
        if session_id not in self._model.sessions:
            self._count("open", await self._end_of(stream), refusal(Code.ABORTED, "session"))
            return
        async with asyncio.timeout(PATIENCE):
            await stream.initial_metadata()
        if session_id in self._streams:
            await self._ended(session_id, "second stream", refusal(Code.ABORTED, "another stream"), over=False)
        self._streams[session_id] = stream

    async def _hang_up(self, rng: random.Random, session_id: int) -> None:
        stream = self._streams[session_id]
        if rng.random() < 0.5:
            self._note("half-close", str(session_id))
            await stream.done_writing()
            await self._ended(session_id, "half-closed", OK)
            return
        self._note("cancel", str(session_id))
        student = self._model.sessions[session_id]
        stream.cancel()
        del self._streams[session_id]
        self._gone(session_id)
        async with asyncio.timeout(PATIENCE):
            while await self._connected(student):  # noqa: ASYNC110 - the server's state, which sets no event here
                await asyncio.sleep(0.002)
        self._seen["cancelled stream", "CANCELLED"] += 1

    async def _contribute(self, rng: random.Random, session_id: int, raw: bytes) -> None:
        kind = "contribution"
        raw = generators.on_the_way(rng, raw, session_id)
        stream = self._streams[session_id]
        expected = (
            refusal(Code.RESOURCE_EXHAUSTED) if len(raw) > self._limit else self._model.contribution(session_id, raw)
        )
        self._note(kind, f"{session_id} {_shown(raw)} {expected}")
        before = await asyncio.to_thread(self._received)
        with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
            await stream.write(raw)
        if isinstance(expected, ExpectedAnswer):
            await self._ended(session_id, kind, expected)
            return
        number = pb.ExchangeRequest.FromString(raw).round
        answered = self._model.contributed(session_id, number, expected)
        if not answered:  # streams have no order between them: what comes next on another could overtake it
            async with asyncio.timeout(PATIENCE):
                while await asyncio.to_thread(self._received) == before:
                    pass
        for waiter, (closed, data) in answered.items():
            targets = await self._answer(waiter)
            if targets.round != closed or targets.targets["logits"].data != data:
                raise WrongError(f"session {waiter}, round {closed}: got other targets, of round {targets.round}")
        self._seen[kind, "OK"] += 1

    async def _insist(self, session_id: int) -> None:
        """Ask for the same round again and again, until that is too often."""
        number = max(self._model.closed)
        message = contribution(self._model.experiment, self._model.experiment.names[0], number)
        published, data = self._model.closed[number]
        message.batch.ids.data, message.batch.labels.data = published.ids, published.labels
        raw, rate = append_checksum(message, str(session_id)), Limits().repeats
        self._note("insist", f"{session_id} round {number}")
        started = time.monotonic()
        with contextlib.suppress(grpc.aio.AioRpcError):  # how it ends is looked at below
            for again in itertools.count():
                await self._streams[session_id].write(raw)
                targets = await self._answer(session_id)
                if targets.round != number or targets.targets["logits"].data != data:
                    raise WrongError(f"session {session_id}, round {number}: got other targets when it asked again")
                if again > rate.burst + 1 + rate.per_second * (time.monotonic() - started):
                    raise WrongError(f"session {session_id} was answered {again} times for round {number}")
        await self._ended(session_id, "insisted", refusal(Code.RESOURCE_EXHAUSTED, "repeats too often"))

    # What a worker sends

    def _honest(self, rng: random.Random, number: int) -> bytes:
        experiment = self._model.experiment
        message = contribution(experiment, rng.choice(experiment.names), number)
        if rng.random() < 0.1:
            message = contribution(experiment, experiment.names[0], number, first=rng.randrange(9))
        raw = message.SerializeToString()
        return generators.with_unknown_fields(rng, raw) if rng.random() < 0.2 else raw

    def _spoilt(self, rng: random.Random) -> bytes:
        if rng.random() < 0.2:
            return generators.fill(rng, pb.ExchangeRequest(), 0.8).SerializeToString()
        if rng.random() < 0.2:
            return generators.noise(rng, rng.choice((20, 200, self._limit + 5)))
        return generators.mutate(rng, self._honest(rng, self._model.frontier), self._raw)

    def _lie(self, rng: random.Random) -> bytes:
        """A real contribution but for one or two of its fields."""
        experiment = self._model.experiment
        message = contribution(experiment, experiment.names[0], self._model.frontier)
        for _ in range(rng.randint(1, 2)):
            tensor = rng.choice((message.batch.ids, message.batch.labels, message.batch.outputs["logits"]))
            match rng.randrange(9):
                case 8:
                    message.batch.sparse_outputs[generators.text(rng)].size = generators.number(rng, 32)
                case 0:
                    tensor.dtype = rng.choice((0, 1, 2, 3, 4, 5, 2**31 - 1, -1))
                case 1:
                    tensor.shape[:] = [generators.number(rng, 32) for _ in range(rng.choice((0, 1, 2, 3, 9, 5000)))]
                case 2:
                    tensor.data = tensor.data[: rng.randrange(len(tensor.data) + 1)] + generators.noise(rng, 9)
                case 3:
                    logits = logits_of(experiment, experiment.names[0], self._model.frontier)
                    logits[rng.randrange(len(logits)), 0] = rng.choice(
                        [each for each in generators.FLOATS if abs(each) < 1e39 or each != each]
                    )
                    message.batch.outputs["logits"].CopyFrom(encode(logits, "float32"))
                case 4:
                    labels = bytearray(message.batch.labels.data)
                    labels[:8] = rng.choice((-1, 3, 2**63 - 1, -(2**63), 0)).to_bytes(8, "little", signed=True)
                    message.batch.labels.data = bytes(labels)
                case 5:
                    message.round = rng.choice((self._model.frontier + 1, generators.number(rng)))
                case 6:
                    message.batch.outputs[generators.text(rng)].CopyFrom(tensor)
                case _:
                    message.held_out.CopyFrom(message.batch)
        return message.SerializeToString()

    # Plumbing

    def _any_session(self, rng: random.Random) -> int:
        """A live session, one that is over, or a number out of the air."""
        live, roll = list(self._model.sessions), rng.random()
        if live and roll < 0.7:
            return rng.choice(live)
        return rng.choice(self._dead) if self._dead and roll < 0.85 else generators.number(rng)

    async def _knock(self, rng: random.Random, call: Call) -> None:
        """Make a call without the token, where there is one; that may change nothing."""
        if self._endpoint.token is None or rng.random() < 0.5:
            return
        assert self._channel is not None
        _, token = self._endpoint.token.metadata
        made = locked_out(rng, call, token)
        self._note(made.kind, str(made.metadata))
        self._count(made.kind, await calls.make(self._endpoint.stranger, self._channel, made), made.expected)

    async def _unary(self, rng: random.Random, rpc: str, raw: bytes, expected: ExpectedAnswer) -> Answer:
        if len(raw) > self._limit:
            expected = refusal(Code.RESOURCE_EXHAUSTED)
        self._note(rpc, f"{_shown(raw)} {expected}")
        assert self._channel is not None
        call = Call(rpc, PREFIX + rpc, [raw], expected)
        await self._knock(rng, call)
        answer = await calls.make(self._endpoint, self._channel, call)
        self._count(rpc, answer, expected)
        return answer

    async def _answer(self, session_id: int) -> pb.Targets:
        async with asyncio.timeout(PATIENCE):
            while True:
                raw = await self._streams[session_id].read()
                if not isinstance(raw, bytes):
                    raise WrongError(f"session {session_id} ended without the targets that it waits for")
                reply = pb.ExchangeResponse.FromString(raw)
                if reply.HasField("targets"):
                    return reply.targets

    async def _ended(
        self, session_id: int, kind: str, expected: ExpectedAnswer, *, superseded: bool = False, over: bool = True
    ) -> None:
        if over:
            self._gone(session_id)
        stream = self._streams.pop(session_id, None)
        if stream is None:
            return
        self._count(kind, await self._end_of(stream), expected)
        if (SUPERSEDED_KEY in dict(await stream.trailing_metadata() or ())) is not superseded:
            raise WrongError(
                f"session {session_id}: {SUPERSEDED_KEY} is set where it must not be, or not where it must"
            )

    async def _end_of(self, stream: Any) -> Answer:
        try:
            async with asyncio.timeout(PATIENCE):
                while isinstance(raw := await stream.read(), bytes):
                    if pb.ExchangeResponse.FromString(raw).HasField("targets"):
                        raise WrongError("targets that nobody asked for")
                return Answer(await stream.code(), await stream.details() or "")
        except grpc.aio.AioRpcError as error:
            return Answer(error.code(), error.details() or "")

    async def _connected(self, student: str) -> bool:
        assert self._channel is not None
        answer = await calls.make(self._endpoint, self._channel, Call("GetRun", f"{PREFIX}GetRun", [b""], OK))
        states = {each.name: each.state for each in pb.GetRunResponse.FromString(answer.replies[0]).run.participants}
        return states[student] == pb.PARTICIPANT_STATE_CONNECTED

    def _gone(self, session_id: int) -> None:
        self._model.over(session_id)
        self._dead = [*self._dead[-20:], session_id]

    def _count(self, kind: str, answer: Answer, expected: ExpectedAnswer) -> None:
        check(expected, answer)
        self._seen[kind, answer.code.name] += 1

    def _note(self, what: str, more: str) -> None:
        self.steps.append(f"{what} {more}")


def _shown(raw: bytes) -> str:
    return raw.hex() if len(raw) < 600 else f"{raw[:100].hex()}… {len(raw)} bytes"
