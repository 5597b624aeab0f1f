"""Which answers are right: a second, plain reading of the contract that a campaign holds the server to.

:class:`Model` is one run as the contract describes it, for a fuzzer that is its only client and does one thing at a time.
It shares no code with the server but the generated messages and the methods' pure functions. A run that the fuzzer has
no session in is the same model with no sessions: all that it may do there is to be refused.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import torch
from google.protobuf.duration_pb2 import Duration
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
LARGEST_STEPS = 2**53
LONGEST_DIGEST = 64
LONGEST_SPAN = 315_576_000_000  # seconds, by protobuf's definition of a Duration


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
    has = raw[-6:-4] == CHECKSUM_TAG if message is None else message.HasField("checksum")
    return has and not verify_checksum(raw)


@dataclass(frozen=True)
class Published:
    """A valid contribution."""

    ids: bytes
    labels: bytes
    logits: bytes


@dataclass
class Model:
    """One run, whose every step exchanges. `settled` is what the first worker said of its data: digest and samples."""

    experiment: Experiment
    settled: tuple[bytes, int] | None = None
    sessions: dict[int, str] = field(default_factory=dict[int, str])
    frontier: int = 0
    oldest: int = 0
    durable: dict[str, int] = field(default_factory=dict[str, int])
    open: dict[str, Published] = field(default_factory=dict[str, Published])
    waiting: dict[int, int] = field(default_factory=dict[int, int])
    closed: dict[int, tuple[Published, bytes]] = field(default_factory=dict[int, tuple[Published, bytes]])

    @property
    def length(self) -> int:
        """The number of steps, which is that of rounds; 0 until it is settled."""
        return 0 if self.settled is None else self._steps(self.settled[1])

    def _steps(self, samples: int) -> int:
        training = self.experiment.training
        return training.epochs * (samples // training.batch_size)

    def join(self, raw: bytes) -> ExpectedAnswer:
        request = parsed(pb.JoinRequest, raw)
        if not isinstance(request, pb.JoinRequest):
            return NO_MESSAGE
        # Another version may mean anything by its other fields, so they are not looked at.
        if request.protocol_version != PROTOCOL_VERSION:
            both = f"protocol_version: the server speaks {PROTOCOL_VERSION}, this worker {request.protocol_version}; "
            return refusal(Code.FAILED_PRECONDITION, both)
        differs: list[str] = []
        wrong: list[str] = []
        if request.participant not in self.experiment.names:
            differs.append("participant ")
        if request.experiment_sha256 != hashlib.sha256(identity(self.experiment).encode()).digest():
            differs.append("experiment")
        if request.lanes and pb.LANE_GRPC not in request.lanes:
            differs.append("lanes: ")
        if request.encodings and pb.ENCODING_DENSE not in request.encodings:
            differs.append("encodings: ")
        classes = self.experiment.data.class_count
        if {name: list(shape.dims) for name, shape in request.outputs.items()} != {"logits": [classes]}:
            differs.append("outputs: ")
        if request.data.classes != classes:
            differs.append("data.classes: ")
        if self.settled is not None:
            digest, samples = self.settled
            if request.data.data_sha256[:LONGEST_DIGEST] != digest:
                differs.append("data.data_sha256: ")
            if request.data.train_samples != samples:
                differs.append("data.train_samples: ")
        training, steps = self.experiment.training, self._steps(request.data.train_samples)
        if not training.batch_size <= request.data.train_samples <= LARGEST_STEPS // training.epochs:
            wrong.append("data.train_samples: ")
        if request.total_steps != steps:
            wrong.append("total_steps: ")
        if request.total_rounds != steps:
            wrong.append("total_rounds: ")
        if request.steps_trained > steps:
            wrong.append("steps_trained: ")
        if request.first_round > steps:
            wrong.append("first_round: ")
        if request.first_round > self.frontier:
            differs.append("resumes at round ")
        if request.first_round < self.oldest:
            differs.append("needs round ")
        codes = {Code.FAILED_PRECONDITION} if differs else set[grpc.StatusCode]()
        codes |= {Code.INVALID_ARGUMENT} if wrong else set[grpc.StatusCode]()
        return ExpectedAnswer(frozenset(codes), (*differs, *wrong)) if codes else OK

    def joined(self, raw: bytes, session_id: int) -> int | None:
        """Take in an admission; return the session that it ended."""
        request = pb.JoinRequest.FromString(raw)
        older = next((number for number, name in self.sessions.items() if name == request.participant), None)
        if older is not None:
            self.over(older)
        self.sessions[session_id] = request.participant
        self.settled = self.settled or (
            request.data.data_sha256[:LONGEST_DIGEST],
            request.data.train_samples,
        )
        name = request.participant
        self.durable[name] = min(self.durable.get(name, 0), request.first_round)
        return older

    def over(self, session_id: int) -> None:
        self.sessions.pop(session_id, None)
        self.waiting.pop(session_id, None)

    def report(self, raw: bytes) -> ExpectedAnswer:
        request = parsed(pb.ReportRequest, raw)
        if not isinstance(request, pb.ReportRequest):
            return NO_MESSAGE
        wrong: list[str] = []
        if request.session_id in self.sessions:
            last = self.length
            wrong += [name for name in ("steps_trained", "round") if getattr(request, name) > last]
            wrong += ["durable_round"] if request.durable_round > request.round else []
            wrong += [
                f"measurements.{at}.steps_trained"
                for at, each in enumerate(request.measurements)
                if each.steps_trained > last
            ]
        if not math.isfinite(request.epochs_trained) or request.epochs_trained < 0:
            wrong.append("epochs_trained")
        wrong += [name for name in ("step_time", "wait_time") if not _is_span(getattr(request, name))]
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
        if request.session_id not in self.sessions:
            return refusal(Code.ABORTED, f"session {request.session_id} ")
        return OK

    def reported(self, raw: bytes) -> None:
        request = pb.ReportRequest.FromString(raw)
        student = self.sessions[request.session_id]
        self.durable[student] = max(self.durable.get(student, 0), min(request.durable_round, self.frontier))
        self._forget()

    def leave(self, raw: bytes) -> ExpectedAnswer:
        request = parsed(pb.LeaveRequest, raw)
        if not isinstance(request, pb.LeaveRequest):
            return NO_MESSAGE
        if request.reason not in (pb.LEAVE_REASON_FINISHED, pb.LEAVE_REASON_STOPPED, pb.LEAVE_REASON_FAILED):
            return refusal(Code.INVALID_ARGUMENT, "reason: ")
        if request.session_id not in self.sessions:
            return refusal(Code.ABORTED, f"session {request.session_id} ")
        if request.reason == pb.LEAVE_REASON_FINISHED and self.frontier < self.length:
            return refusal(Code.FAILED_PRECONDITION, "reason: FINISHED is not allowed while ")
        return OK

    def left(self, raw: bytes) -> int:
        """Take in that a session ended; return it."""
        request = pb.LeaveRequest.FromString(raw)
        student = self.sessions[request.session_id]
        self.over(request.session_id)
        if request.reason == pb.LEAVE_REASON_FINISHED:
            self.durable[student] = max(self.durable.get(student, 0), self.frontier)
            self._forget()
        return request.session_id

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
                wanted = request.interval.seconds + request.interval.nanos / 1e9
                fine = not request.HasField("interval") or (_is_span(request.interval) and 0.1 <= wanted <= 60)
                return OK if fine else refusal(Code.INVALID_ARGUMENT, "interval: ")
        raise KeyError(rpc)

    def contribution(self, session_id: int, raw: bytes) -> ExpectedAnswer | Published:
        """Return how a contribution is refused, or what it publishes if it is taken."""
        if not verify_checksum(raw, str(session_id)):
            return refusal(Code.ABORTED, "damaged on the way")
        message = parsed(pb.ExchangeRequest, raw)
        if not isinstance(message, pb.ExchangeRequest):
            return NO_MESSAGE
        if message.round >= self.length:
            return refusal(Code.FAILED_PRECONDITION, f"round: {message.round} is not one of the run's")
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
        student = self.sessions[session_id]
        others = {name: each for name, each in self.open.items() if name != student}
        if any(not _same(each, published) for each in others.values()):
            if any(self.sessions[waiter] != student for waiter in self.waiting):
                return refusal(Code.FAILED_PRECONDITION, f"round {message.round}: ")
            self.open.clear()
        return published

    def contributed(self, session_id: int, number: int, published: Published) -> dict[int, tuple[int, bytes]]:
        """Take in a contribution that is taken; return who is answered now, the round and its targets."""
        if number < self.frontier:
            return {session_id: (number, self.closed[number][1])}
        self.open[self.sessions[session_id]] = published
        self.waiting[session_id] = number
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

    def _wrong(self, batch: pb.SampleOutputs) -> list[str]:
        size, classes = self.experiment.training.batch_size, self.experiment.data.class_count
        wrong: list[str] = []
        wrong += _lies(batch.ids, "batch.ids", pb.DTYPE_INT64, [size], 8)
        lies = _lies(batch.labels, "batch.labels", pb.DTYPE_INT64, [size], 8)
        if not lies:
            labels = np.frombuffer(batch.labels.data, "<i8")
            lies = ["batch.labels: "] if ((labels < 0) | (labels >= classes)).any() else []
        wrong += lies
        if batch.sparse_outputs:
            wrong.append("batch.sparse_outputs: ")
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


def _is_span(time: Duration) -> bool:
    return 0 <= time.seconds <= LONGEST_SPAN and 0 <= time.nanos < 10**9


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
