"""Which answers are right: a second, plain reading of the contract that a campaign holds the server to.

:class:`Model` is one run as the contract describes it, for a fuzzer that is its only client and does one thing at a time.
It shares no code with the server but the generated messages and the methods' pure functions. A run that the fuzzer has
no session in is the same model with no sessions: all that it may do there is to be refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import torch
from google.protobuf.message import DecodeError, Message

from codistill import PROTOCOL_VERSION
from codistill.config.experiment import Experiment
from codistill.config.fingerprint import identity
from codistill.methods.aggregator import RoundInputs
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.tensors import encode
from codistill_server import methods
from fuzz.generators import CHECKSUM_TAG, verify_checksum

Code = grpc.StatusCode
LARGEST_ROUNDS = 2**53


@dataclass(frozen=True)
class ExpectedAnswer:
    """The allowed answers: one of `codes`; a refusal's text must hold one of `words`, where there are any."""

    codes: frozenset[grpc.StatusCode]
    words: tuple[str, ...] = ()


OK = ExpectedAnswer(frozenset({Code.OK}))


def refusal(code: grpc.StatusCode, *words: str) -> ExpectedAnswer:
    return ExpectedAnswer(frozenset({code}), words)


def parsed(kind: type[Message], raw: bytes) -> Message | None:
    try:
        return kind.FromString(raw)
    except DecodeError:
        return None


NO_MESSAGE = refusal(Code.INVALID_ARGUMENT, "are not a ")
UNAUTHENTICATED = refusal(Code.UNAUTHENTICATED, "this server asks for a token", "is not this server's")


def damaged(kind: type[Message], raw: bytes) -> bool:
    """Whether a unary call's message has a checksum that is not its own; one without is believed."""
    message: Any = parsed(kind, raw)
    has = raw[-5:-4] == CHECKSUM_TAG if message is None else message.HasField("checksum")
    return has and not verify_checksum(raw)


@dataclass(frozen=True)
class Published:
    """A valid contribution."""

    ids: bytes
    labels: bytes
    logits: bytes


@dataclass
class Model:
    """One run. `settled` is what the first worker said of its data: digest, samples, rounds."""

    experiment: Experiment
    settled: tuple[str, int, int] | None = None
    sessions: dict[int, str] = field(default_factory=dict[int, str])
    frontier: int = 0
    oldest: int = 0
    durable: dict[str, int] = field(default_factory=dict[str, int])
    open: dict[str, Published] = field(default_factory=dict[str, Published])
    waiting: dict[int, int] = field(default_factory=dict[int, int])
    closed: dict[int, tuple[Published, bytes]] = field(default_factory=dict[int, tuple[Published, bytes]])

    def join(self, raw: bytes) -> ExpectedAnswer:
        request = parsed(pb.JoinRequest, raw)
        if not isinstance(request, pb.JoinRequest):
            return NO_MESSAGE
        differs: list[str] = []
        wrong: list[str] = []
        if request.protocol_version != PROTOCOL_VERSION:
            differs.append("protocol_version: ")
        if request.student not in self.experiment.names:
            differs.append("student ")
        if request.experiment != identity(self.experiment):
            differs.append("experiment")
        classes = self.experiment.data.class_count
        if {name: list(shape.dims) for name, shape in request.outputs.items()} != {"logits": [classes]}:
            differs.append("outputs: ")
        if request.data.classes != classes:
            differs.append("data.classes: ")
        if self.settled is not None:
            digest, samples, rounds = self.settled
            if request.data.digest != digest:
                differs.append("data.digest: ")
            if request.data.train_samples != samples:
                differs.append("data.train_samples: ")
            if request.total_rounds != rounds:
                differs.append("total_rounds: ")
        if request.total_rounds > LARGEST_ROUNDS:
            wrong.append("total_rounds: ")
        if request.first_round > request.total_rounds:
            wrong.append("first_round: ")
        if request.first_round > self.frontier:
            differs.append("resumes at round ")
        if request.first_round < self.oldest:
            differs.append("needs round ")
        codes = {Code.FAILED_PRECONDITION} if differs else set[grpc.StatusCode]()
        codes |= {Code.INVALID_ARGUMENT} if wrong else set[grpc.StatusCode]()
        return ExpectedAnswer(frozenset(codes), (*differs, *wrong)) if codes else OK

    def joined(self, raw: bytes, session: int) -> int | None:
        """Take in an admission; return the session that it ended."""
        request = pb.JoinRequest.FromString(raw)
        older = next((number for number, name in self.sessions.items() if name == request.student), None)
        if older is not None:
            self.over(older)
        self.sessions[session] = request.student
        self.settled = self.settled or (request.data.digest, request.data.train_samples, request.total_rounds)
        self.durable[request.student] = min(self.durable.get(request.student, 0), request.first_round)
        return older

    def over(self, session: int) -> None:
        self.sessions.pop(session, None)
        self.waiting.pop(session, None)

    def report(self, raw: bytes) -> ExpectedAnswer:
        request = parsed(pb.ReportRequest, raw)
        if not isinstance(request, pb.ReportRequest):
            return NO_MESSAGE
        wrong: list[str] = []
        if request.session in self.sessions and self.settled is not None:
            last = self.settled[2]
            wrong += [name for name in ("round", "durable_round") if getattr(request, name) > last]
            wrong += [f"measurements.{at}.round" for at, each in enumerate(request.measurements) if each.round > last]
        for name in ("epoch", "step_seconds", "wait_seconds"):
            value = getattr(request, name)
            if not math.isfinite(value) or value < 0:
                wrong.append(name)
        for at, each in enumerate(request.measurements):
            if each.split not in (pb.SPLIT_TRAIN, pb.SPLIT_TEST):
                wrong.append(f"measurements.{at}.split")
            if not 0 <= each.accuracy <= 1:
                wrong.append(f"measurements.{at}.accuracy")
            wrong += [
                f"measurements.{at}.{name}"
                for name in ("loss", "distillation_loss")
                if not math.isfinite(getattr(each, name))
            ]
        if wrong:
            return refusal(Code.INVALID_ARGUMENT, *(f"{name}: " for name in wrong))
        if request.session not in self.sessions:
            return refusal(Code.ABORTED, f"session {request.session} ")
        return OK

    def reported(self, raw: bytes) -> None:
        request = pb.ReportRequest.FromString(raw)
        student = self.sessions[request.session]
        self.durable[student] = max(self.durable.get(student, 0), min(request.durable_round, self.frontier))
        self._forget()

    def leave(self, raw: bytes) -> ExpectedAnswer:
        request = parsed(pb.LeaveRequest, raw)
        if not isinstance(request, pb.LeaveRequest):
            return NO_MESSAGE
        if request.reason not in (pb.LEAVE_REASON_FINISHED, pb.LEAVE_REASON_STOPPED, pb.LEAVE_REASON_FAILED):
            return refusal(Code.INVALID_ARGUMENT, "reason: ")
        if request.session not in self.sessions:
            return refusal(Code.ABORTED, f"session {request.session} ")
        return OK

    def left(self, raw: bytes) -> int:
        """Take in that a session ended; return it."""
        request = pb.LeaveRequest.FromString(raw)
        student = self.sessions[request.session]
        self.over(request.session)
        if request.reason == pb.LEAVE_REASON_FINISHED:
            self.durable[student] = max(self.durable.get(student, 0), self.frontier)
            self._forget()
        return request.session

    def unary(self, rpc: str, raw: bytes) -> ExpectedAnswer:
        """Return how a call is answered; one that was damaged is to be made again."""
        kinds: dict[str, type[Message]] = {"Join": pb.JoinRequest, "Report": pb.ReportRequest, "Leave": pb.LeaveRequest}
        if rpc in kinds and damaged(kinds[rpc], raw):
            return refusal(Code.UNAVAILABLE, "damaged on the way")
        match rpc:
            case "Join":
                return self.join(raw)
            case "Report":
                return self.report(raw)
            case "Leave":
                return self.leave(raw)
            case "GetRun":
                return NO_MESSAGE if parsed(pb.GetRunRequest, raw) is None else OK
            case "WatchRun":
                request = parsed(pb.WatchRunRequest, raw)
                if not isinstance(request, pb.WatchRunRequest):
                    return NO_MESSAGE
                wanted = request.interval_seconds
                fine = wanted == 0 or 0.1 <= wanted <= 60
                return OK if fine else refusal(Code.INVALID_ARGUMENT, "interval_seconds: ")
        raise KeyError(rpc)

    def contribution(self, session: int, raw: bytes) -> ExpectedAnswer | Published:
        """Return how a contribution is refused, or what it publishes if it is taken."""
        if not verify_checksum(raw, str(session)):
            return refusal(Code.ABORTED, "damaged on the way")
        message = parsed(pb.Contribution, raw)
        if not isinstance(message, pb.Contribution):
            return NO_MESSAGE
        wrong = self._wrong(message.batch)
        if message.HasField("held_out"):
            wrong.append("held_out: ")
        if wrong:
            return refusal(Code.INVALID_ARGUMENT, *wrong)
        if message.round > self.frontier:
            return refusal(Code.ABORTED, f"expected round {self.frontier}")
        if message.round < self.oldest:
            return refusal(Code.FAILED_PRECONDITION, f"keeps rounds from {self.oldest} on")
        batch = message.batch
        published = Published(batch.ids.data, batch.labels.data, batch.outputs["logits"].data)
        if message.round < self.frontier:
            then, _ = self.closed[message.round]
            return (
                published if _same(then, published) else refusal(Code.FAILED_PRECONDITION, f"round {message.round}: ")
            )
        student = self.sessions[session]
        others = {name: each for name, each in self.open.items() if name != student}
        if any(not _same(each, published) for each in others.values()):
            if any(self.sessions[waiter] != student for waiter in self.waiting):
                return refusal(Code.FAILED_PRECONDITION, f"round {message.round}: ")
            self.open.clear()
        return published

    def contributed(self, session: int, number: int, published: Published) -> dict[int, tuple[int, bytes]]:
        """Take in a contribution that is taken; return who is answered now, the round and its targets."""
        if number < self.frontier:
            return {session: (number, self.closed[number][1])}
        self.open[self.sessions[session]] = published
        self.waiting[session] = number
        if len(self.open) < len(self.experiment.names):
            return {}
        made = self._targets()
        answered = dict.fromkeys(self.waiting, (number, made))
        self.closed[number] = published, made
        self.frontier += 1
        self.open, self.waiting = {}, {}
        return answered

    def _targets(self) -> bytes:
        aggregator = methods.create(self.experiment.distillation)
        assert aggregator is not None
        shape = (self.experiment.training.batch_size, self.experiment.data.class_count)
        outputs = [_floats(self.open[name].logits).reshape(shape) for name in self.experiment.names]
        labels = torch.frombuffer(bytearray(self.open[self.experiment.names[0]].labels), dtype=torch.int64)
        inputs = RoundInputs(self.experiment.names, {"logits": torch.stack(outputs)}, labels)
        made = aggregator.targets(inputs).shared
        assert made is not None
        return encode(made["logits"], "float32").data

    def _wrong(self, batch: pb.Samples) -> list[str]:
        size, classes = self.experiment.training.batch_size, self.experiment.data.class_count
        wrong: list[str] = []
        wrong += _lies(batch.ids, "batch.ids", pb.DTYPE_INT64, [size], 8)
        lies = _lies(batch.labels, "batch.labels", pb.DTYPE_INT64, [size], 8)
        if not lies:
            labels = np.frombuffer(batch.labels.data, "<i8")
            lies = ["batch.labels: "] if ((labels < 0) | (labels >= classes)).any() else []
        wrong += lies
        if set(batch.outputs) != {"logits"}:
            return [*wrong, "batch.outputs: "]
        logits = batch.outputs["logits"]
        lies = _lies(logits, "batch.outputs.logits", pb.DTYPE_FLOAT32, [size, classes], 4)
        if not lies:
            with np.errstate(invalid="ignore"):  # a signalling NaN
                values = np.frombuffer(logits.data, "<f4").astype(np.float64)
            lies = ["batch.outputs.logits["] if not (np.abs(values) <= 1e30).all() else []
        return wrong + lies

    def _forget(self) -> None:
        needed = min([self.frontier, *(self.durable.get(name, 0) for name in self.experiment.names)])
        if needed > self.oldest:
            self.oldest = needed
            self.closed = {number: each for number, each in self.closed.items() if number >= needed}


def _floats(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.float32).clone()


def _same(one: Published, other: Published) -> bool:
    return (one.ids, one.labels) == (other.ids, other.labels)


def _lies(tensor: pb.Tensor, name: str, dtype: int, shape: list[int], width: int) -> list[str]:
    wrong: list[str] = []
    if tensor.dtype != dtype:
        wrong.append(f"{name}.dtype: ")
    if list(tensor.shape) != shape:
        wrong.append(f"{name}.shape: ")
    if not wrong and len(tensor.data) != math.prod(shape) * width:
        wrong.append(f"{name}.data: ")
    return wrong
