"""Floods: more than a server with the limits of every server gives one peer, all at once."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from typing import Any

import grpc.aio

from codistill.config.experiment import Experiment
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.times import duration
from codistill_server.admission.contributions import receive_limit
from codistill_server.ratelimit import Rate
from codistill_server.rpc.quotas import Limits
from fuzz.calls import PATIENCE, PREFIX, Answer, Call, WrongError, check, make
from fuzz.endpoints import Endpoint
from fuzz.oracle import Code, ExpectedAnswer
from server.support import join_request

_LIMITS = Limits()
_LATER = frozenset({Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE})


class Flooder:
    """One flood per call of :meth:`flood`; what is over a limit must be told so, and nothing else may be refused for it.

    Args:
        endpoint: the server.
        experiment: its run.
        seen: counts answers by (kind, status).
    """

    def __init__(self, endpoint: Endpoint, experiment: Experiment, seen: Counter[tuple[str, str]]) -> None:
        self._endpoint = endpoint
        self._experiment = experiment
        self._seen = seen

    async def flood(self, rng: random.Random) -> None:
        """Send one flood.

        Raises:
            WrongError: more got through than the limit says, or an answer is wrong.
        """
        async with self._endpoint.channel() as channel:
            await rng.choice((self._joins, self._bytes, self._watchers))(rng, channel)

    async def _joins(self, rng: random.Random, channel: grpc.aio.Channel) -> None:
        request = join_request(self._experiment, rng.choice((*self._experiment.names, "nobody")))
        request.data.classes = 77
        expected = _or_later(Code.FAILED_PRECONDITION, "data.classes: ", "participant ")
        call = Call("flood of joins", f"{PREFIX}Join", [request.SerializeToString()], expected)
        await self._send(channel, call, 120, _LIMITS.joins, 1)

    async def _bytes(self, rng: random.Random, channel: grpc.aio.Channel) -> None:
        most = receive_limit(self._experiment) - 100
        request = pb.LeaveRequest(session_id=2**60, reason=pb.LEAVE_REASON_STOPPED)
        request.message = "x" * rng.randrange(most * 3 // 4, most)
        raw, expected = request.SerializeToString(), _or_later(Code.ABORTED, f"session {request.session_id} ")
        call = Call("flood of bytes", f"{PREFIX}Leave", [raw], expected)
        await self._send(channel, call, round(1.5 * _LIMITS.call_bytes.burst / len(raw)), _LIMITS.call_bytes, len(raw))

    async def _send(self, channel: grpc.aio.Channel, call: Call, count: int, rate: Rate, amount: int) -> None:
        """Make a call many times at once; each takes an amount of what the rate gives."""
        started = time.monotonic()
        answers = await asyncio.gather(*(make(self._endpoint, channel, call) for _ in range(count)))
        passed = self._passed(call, answers)
        if (passed - 1) * amount > rate.burst + rate.per_second * (time.monotonic() - started):
            raise WrongError(f"{passed} of {count} calls of a {call.kind} got past the limit")

    async def _watchers(self, rng: random.Random, channel: grpc.aio.Channel) -> None:
        raw = pb.WatchRunRequest(interval=duration(60)).SerializeToString()
        count = _LIMITS.watchers + rng.randint(1, 40)
        watch: Any = channel.unary_stream(f"{PREFIX}WatchRun")
        ongoing = [watch(raw, metadata=self._endpoint.metadata, timeout=PATIENCE) for _ in range(count)]
        call = Call("flood of watchers", f"{PREFIX}WatchRun", [raw], _or_later(Code.OK))
        try:
            passed = self._passed(call, await asyncio.gather(*(_first(each) for each in ongoing)))
        finally:
            for each in ongoing:
                each.cancel()
        if passed > _LIMITS.watchers:
            raise WrongError(f"{passed} WatchRun streams are open at a time")
        async with asyncio.timeout(PATIENCE):  # they are let go of
            while (await make(self._endpoint, channel, call)).code is not Code.OK:
                pass

    def _passed(self, call: Call, answers: list[Answer]) -> int:
        for answer in answers:
            check(call.expected, answer)
            self._seen[call.kind, answer.code.name] += 1
        return sum(answer.code not in _LATER for answer in answers)


async def _first(ongoing: Any) -> Answer:
    """Return how a stream begins: with a reply, or with its end."""
    with contextlib.suppress(grpc.aio.AioRpcError):
        if isinstance(await ongoing.read(), bytes):
            return Answer(Code.OK, "")
    return Answer(await ongoing.code(), await ongoing.details() or "")


def _or_later(code: Code, *words: str) -> ExpectedAnswer:
    """The answers allowed to a call that can be one too many, of its kind or of the streams of a connection."""
    return ExpectedAnswer(frozenset({code, *_LATER}), (*words, "try again in ", "RST_STREAM with error code 7"))
