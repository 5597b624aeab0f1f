"""Calls from outside a run: whatever they carry, they may change nothing and must be refused as the contract says."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from codistill.v1 import distillation_pb2 as pb
from codistill.wire.channel import SESSION_KEY
from codistill.wire.checksum import format_session
from codistill.wire.token import TOKEN_KEY
from fuzz import generators
from fuzz.endpoints import Endpoint
from fuzz.oracle import NO_MESSAGE, OK, UNAUTHENTICATED, Code, ExpectedAnswer, Model, parsed, refusal
from server.support import contribution, join_request

PREFIX = "/codistill.v1.DistillationService/"
UNARY = {"Join": pb.JoinRequest, "Report": pb.ReportRequest, "Leave": pb.LeaveRequest, "GetRun": pb.GetRunRequest}
REQUESTS = {**UNARY, "WatchRun": pb.WatchRunRequest, "Exchange": pb.ExchangeRequest}
HEALTH = "/grpc.health.v1.Health/"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
PATIENCE = 20.0
LONGEST_TEXT = 8192
LOST = "Internal error from Core"
"""The words of this process's own gRPC for a stream that ended while it still wrote; the server's words are lost then."""


class WrongError(AssertionError):
    """The server did what it must not."""


@dataclass(frozen=True)
class Call:
    """One call as it goes over the wire, and what may come back."""

    kind: str
    path: str
    messages: Sequence[bytes]
    expected: ExpectedAnswer
    metadata: Sequence[tuple[str, str | bytes]] = ()
    compression: grpc.Compression | None = None
    hang_up: float | None = None

    @property
    def joins(self) -> bool:
        """Whether it is a legitimate worker's join, which a run must let in."""
        return self.path == f"{PREFIX}Join" and self.expected.codes == OK.codes


@dataclass(frozen=True)
class Answer:
    code: grpc.StatusCode
    text: str
    replies: Sequence[bytes] = ()


async def make(endpoint: Endpoint, channel: grpc.aio.Channel, call: Call) -> Answer:
    """Make a call and return how it ends; a stream that goes on is ended after its first reply."""
    options = {"metadata": (*call.metadata, *endpoint.metadata), "compression": call.compression, "timeout": PATIENCE}
    ongoing: Any
    if call.hang_up is None and len(call.messages) == 1:
        # On the wire the same as any other kind of call; the client sends all of it at once.
        ongoing = channel.unary_stream(call.path)(call.messages[0], **options)
    else:
        ongoing = channel.stream_stream(call.path)(iter(call.messages) if call.hang_up is None else None, **options)
    try:
        if call.hang_up is not None:
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError, asyncio.InvalidStateError):
                for message in call.messages:
                    await ongoing.write(message)
                await asyncio.sleep(call.hang_up)
            ongoing.cancel()
            return Answer(Code.CANCELLED, "")
        reply = await ongoing.read()
        if isinstance(reply, bytes):
            if call.path.endswith(("Watch", "WatchRun")):
                return Answer(Code.OK, "", [reply])
            while isinstance(await ongoing.read(), bytes):
                pass
        return Answer(await ongoing.code(), await ongoing.details() or "", [reply] if isinstance(reply, bytes) else [])
    except grpc.aio.AioRpcError as error:
        return Answer(error.code(), error.details() or "")
    finally:
        ongoing.cancel()


def check(expected: ExpectedAnswer, answer: Answer) -> None:
    """Hold an answer to what the contract allows.

    Raises:
        WrongError: it is something else.
    """
    if answer.text == LOST:
        return
    if answer.code not in expected.codes:
        allowed = ", ".join(sorted(code.name for code in expected.codes))
        raise WrongError(f"answered {answer.code.name} ({answer.text[:300]!r}); allowed: {allowed} {expected.words}")
    if answer.code in (Code.OK, Code.CANCELLED):
        return
    text = answer.text
    if len(text.encode()) >= LONGEST_TEXT or "Traceback (most" in text or "Unexpected" in text:
        raise WrongError(f"refused with {text[:500]!r}")
    if expected.words and not any(word in text for word in expected.words):
        raise WrongError(f"refused with {text!r}, which names none of {expected.words}")
    if expected.words and not text.isprintable():
        raise WrongError(f"refused with {text!r}, which is not one printable line")


def locked_out(rng: random.Random, call: Call, token: str) -> Call:
    """Return the call as somebody makes it who does not have the token: refused whatever it is, but for a probe.

    Args:
        rng: the source of chance.
        call: one whose expected answer is that of somebody who has it.
        token: the right value of the metadata.
    """
    at = rng.randrange(7, len(token))
    other = token[:at] + ("x" if token[at] != "x" else "y") + token[at + 1 :]
    tries: Sequence[Sequence[tuple[str, str | bytes]]] = (
        [],
        [],
        [(TOKEN_KEY, other)],
        [(TOKEN_KEY, token[:at])],
        [(TOKEN_KEY, token + rng.choice(("x", token)))],
        [(TOKEN_KEY, token), (TOKEN_KEY, rng.choice((token, other)))],
        [(TOKEN_KEY, token.replace("Bearer", rng.choice(("bearer", "Basic", "Bearer ", ""))))],
        [(TOKEN_KEY, "x" * rng.choice((0, 1, 2000)))],
        [(f"{TOKEN_KEY}-bin", token.encode())],
        [("token", token)],
    )
    metadata = [*call.metadata, *rng.choice(tries)]
    expected = call.expected
    if call.path != f"{HEALTH}Check" and call.hang_up is None:
        refused = UNAUTHENTICATED
        # gRPC refuses a compression that a server does not take before anything else.
        expected = refused if call.compression is None else ExpectedAnswer(refused.codes | {Code.UNIMPLEMENTED})
    return replace(call, kind=f"without the token: {call.kind}", metadata=metadata, expected=expected)


class SessionlessCaller:
    """Draws calls of somebody who has no session in the run.

    Args:
        model: the run, as one without sessions.
        limit: the largest message that the server takes.
        traffic: real messages of another run, by rpc.
    """

    def __init__(self, model: Model, limit: int, traffic: Sequence[tuple[str, bytes]]) -> None:
        self._model = model
        self._limit = limit
        self._traffic = traffic
        self._raw = [raw for _, raw in traffic]

    def draw(self, rng: random.Random) -> Call:
        """Return one call."""
        return rng.choices(
            (self._noise, self._filled, self._near, self._spoilt, self._odd, self._large, self._neighbour),
            (2, 3, 3, 4, 2, 0.3, 1),
        )[0](rng)

    def _call(self, rng: random.Random, kind: str, rpc: str, raw: bytes, **options: Any) -> Call:
        if len(raw) > self._limit and rpc != "Exchange":
            return Call(kind, PREFIX + rpc, [raw], refusal(Code.RESOURCE_EXHAUSTED), **options)
        if rpc != "Exchange":
            return Call(kind, PREFIX + rpc, [raw], self._model.unary(rpc, raw), **options)
        text, expected = self._session(rng)
        metadata = [*options.pop("metadata", ()), *text]
        return Call(kind, PREFIX + rpc, [raw] * rng.choice((0, 1, 2)), expected, metadata, **options)

    def _session(self, rng: random.Random) -> tuple[Sequence[tuple[str, str]], ExpectedAnswer]:
        """Return metadata that name a session which is over or never was, or that were damaged on the way."""
        number = rng.choice((0, 1, 2, 3, generators.number(rng), 10**18))
        whole = format_session(number)
        texts = (
            whole,
            whole,
            whole,
            str(number),
            whole[1:],
            whole[:-1],
            f"1{whole}",
            "",
            "-1",
            "1.0",
            "one",
            "1" * 3000,
        )
        if rng.random() < 0.1:
            return (), refusal(Code.ABORTED, f"metadata {SESSION_KEY}: ")
        return ((SESSION_KEY, rng.choice(texts)),), refusal(Code.ABORTED, "session")

    def _noise(self, rng: random.Random) -> Call:
        return self._call(rng, "noise", rng.choice(list(REQUESTS)), generators.noise(rng))

    def _filled(self, rng: random.Random) -> Call:
        rpc = rng.choice(list(REQUESTS))
        raw = generators.fill(rng, REQUESTS[rpc](), rng.choice((0.3, 0.7, 1.0))).SerializeToString()
        if rng.random() < 0.3:
            raw = generators.with_unknown_fields(rng, raw)
        return self._call(rng, "drawn message", rpc, raw)

    def _near(self, rng: random.Random) -> Call:
        """A real join of a real student, but for one to three fields."""
        experiment = self._model.experiment
        request = join_request(experiment, rng.choice(experiment.names))
        for _ in range(rng.randint(1, 3)):
            match rng.randrange(11):
                case 0:
                    request.protocol_version = generators.number(rng, 32)
                case 1:
                    request.participant = generators.text(rng)
                case 2:
                    # What it says is looked at once the digest differs.
                    request.experiment_json = rng.choice((generators.text(rng), _altered(rng, request.experiment_json)))
                    request.experiment_sha256 = rng.choice((generators.noise(rng), request.experiment_sha256[:-1]))
                case 3:
                    request.data.data_sha256 = rng.choice((generators.noise(rng), request.data.data_sha256 + b"x"))
                case 7:
                    request.total_steps = generators.number(rng)
                case 8:
                    request.total_rounds = generators.number(rng)
                case 9:
                    request.steps_trained = generators.number(rng)
                case 10:
                    offered = rng.choice((request.lanes, request.encodings))
                    offered.extend(generators.number(rng, 31) for _ in range(rng.randint(1, 3)))
                case 4:
                    request.data.train_samples = generators.number(rng)
                case 5:
                    generators.fill(rng, request.outputs[generators.text(rng)])
                case _:
                    request.first_round = generators.number(rng) | 2**40
        return self._call(rng, "join that differs", "Join", request.SerializeToString())

    def _spoilt(self, rng: random.Random) -> Call:
        rpc, raw = rng.choice(self._traffic)
        kind = "replayed traffic"
        if rng.random() < 0.85:
            kind, raw = "mutated traffic", generators.mutate(rng, raw, self._raw)
        if rng.random() < 0.1:
            rpc = rng.choice(list(REQUESTS))
        return self._call(rng, kind, rpc, raw)

    def _large(self, rng: random.Random) -> Call:
        size = self._limit + rng.choice((-40, 0, 1, 1000, 200_000))
        return self._call(rng, "large message", rng.choice(list(UNARY)), bytes([0x1A]) + rng.randbytes(size))

    def _odd(self, rng: random.Random) -> Call:
        """The right messages in the wrong kind of call."""
        rpc = rng.choice(list(REQUESTS))
        raw = rng.choice(
            (b"", generators.noise(rng), contribution(self._model.experiment, "ant", 0).SerializeToString())
        )
        made = self._call(rng, "odd call", rpc, raw)
        match rng.randrange(5):
            case 0:
                path = rng.choice((PREFIX + "Nothing", "/a.b/c", "/", PREFIX, PREFIX + "join", "/x" * 400))
                return Call("unknown method", path, [raw], refusal(Code.UNIMPLEMENTED))
            case 1:
                # The flag stands for the whole call: a server that takes no compression refuses all such calls alike.
                every = ExpectedAnswer(made.expected.codes | {Code.UNIMPLEMENTED})
                return Call("compressed", made.path, made.messages, every, made.metadata, grpc.Compression.Gzip)
            case 2:
                gone = ExpectedAnswer(frozenset({Code.CANCELLED}))
                pause = rng.choice((0.0, 0.0, 0.002))
                return Call("cancelled", made.path, [raw] * rng.randrange(4), gone, made.metadata, hang_up=pause)
            case 3:
                junk = [(f"x-{rng.randrange(99)}", "v" * rng.randrange(60)) for _ in range(rng.randrange(12))]
                junk += [("x-bin", rng.randbytes(30))] if rng.random() < 0.5 else []
                return Call("junk in metadata", made.path, made.messages, made.expected, [*junk, *made.metadata])
            case _:
                if rpc == "Exchange":
                    return made
                # A second message to an rpc that takes one is passed over, or the call ends for it.
                codes = made.expected.codes | {Code.INTERNAL, Code.UNIMPLEMENTED, Code.CANCELLED}
                return Call("two messages", made.path, [*made.messages, raw], ExpectedAnswer(codes), made.metadata)

    def _neighbour(self, rng: random.Random) -> Call:
        """The services that come with every gRPC server."""
        if rng.random() < 0.6:
            name = rng.choice(("", "codistill.v1.DistillationService", "nobody", generators.text(rng)))
            raw = rng.choice((health_pb2.HealthCheckRequest(service=name).SerializeToString(), generators.noise(rng)))
            request = parsed(health_pb2.HealthCheckRequest, raw)
            path = HEALTH + rng.choice(("Check", "Watch"))
            if not isinstance(request, health_pb2.HealthCheckRequest):
                return Call("health", path, [raw], NO_MESSAGE)
            known = request.service in ("", "codistill.v1.DistillationService") or path.endswith("Watch")
            return Call("health", path, [raw], OK if known else refusal(Code.NOT_FOUND))
        request = reflection_pb2.ServerReflectionRequest()
        raws = [
            rng.choice((generators.fill(rng, request).SerializeToString(), generators.noise(rng)))
            for _ in range(rng.randrange(4))
        ]
        bad = any(parsed(reflection_pb2.ServerReflectionRequest, raw) is None for raw in raws)
        return Call("reflection", REFLECTION, raws, NO_MESSAGE if bad else OK)


def _altered(rng: random.Random, text: str) -> str:
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice(("", "0", '"', "[" * 50, '{"a":1},', "é")) + text[at + rng.randrange(3) :]
