"""A model of training, the undisturbed run, and the ledger that holds every run to it.

A student's state is a digest of all the targets that it has learnt from, in order, and what it publishes is a function of
that state. So a target that is wrong, missing, repeated or out of turn changes everything after it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from codistill.config.experiment import Experiment
from codistill.methods.aggregator import RoundInputs, Targets
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.checksum import append_checksum
from codistill.wire.tensors import decode, encode
from codistill_server import methods

__all__ = [
    "BATCH",
    "CLASSES",
    "HELD_OUT",
    "ROUNDS_PER_EPOCH",
    "GoingOn",
    "Ledger",
    "Reference",
    "Violation",
    "contribution",
    "first_state",
    "learn",
]

BATCH, CLASSES, HELD_OUT, ROUNDS_PER_EPOCH = 2, 3, 2, 2
_INT64 = "<i8"


class Violation(AssertionError):  # noqa: N818 - it is what the simulation looks for
    """An invariant does not hold."""


def first_state(seed: int, student: str) -> bytes:
    return hashlib.blake2b(f"{seed} {student}".encode(), digest_size=16).digest()


def learn(state: bytes, targets: pb.Targets) -> bytes:
    return hashlib.blake2b(state + targets.SerializeToString(deterministic=True), digest_size=16).digest()


def contribution(number: int, state: bytes, *, held_out: bool) -> pb.ExchangeRequest:
    """Return what a student in this state publishes in a round."""
    wants = held_out and number > 0 and number % ROUNDS_PER_EPOCH == 0
    return pb.ExchangeRequest(
        round=number,
        batch=_samples(number * BATCH, BATCH, state),
        held_out=_samples(10_000, HELD_OUT, state[::-1]) if wants else None,
    )


def _samples(first: int, rows: int, state: bytes) -> pb.SampleOutputs:
    ids = np.arange(first, first + rows, dtype=_INT64)
    drawn = np.frombuffer(hashlib.shake_128(state).digest(4 * rows * CLASSES), "<i4")
    logits = (drawn.astype("<f4") / np.float32(2**28)).astype("<f4")
    return pb.SampleOutputs(
        ids=pb.Tensor(dtype=pb.DTYPE_INT64, shape=[rows], data=ids.tobytes()),
        labels=pb.Tensor(dtype=pb.DTYPE_INT64, shape=[rows], data=(ids % CLASSES).astype(_INT64).tobytes()),
        outputs={"logits": pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[rows, CLASSES], data=logits.tobytes())},
    )


State = Mapping[str, torch.Tensor]


class Reference:
    """The method's targets as a function of contributions, and the run in which nothing goes wrong.

    Attributes:
        replies: of each round, what each student is answered; under "" for every student that has none of its own.
        states: each student's state after all rounds.
    """

    def __init__(self, experiment: Experiment, rounds: int) -> None:
        self.experiment = experiment
        self.rounds = rounds
        aggregator = methods.create(experiment.distillation)
        assert aggregator is not None
        self._aggregator = aggregator
        self.replies: list[Mapping[str, bytes]] = []
        held_out = experiment.data.held_out > 0
        states = {name: first_state(experiment.seed, name) for name in experiment.names}
        method_state: State = {}
        for number in range(rounds):
            sent = {name: contribution(number, states[name], held_out=held_out) for name in experiment.names}
            replies, method_state = self.close(number, sent, method_state)
            self.replies.append(replies)
            for name in experiment.names:
                states[name] = learn(states[name], pb.ExchangeResponse.FromString(reply_to(replies, name)).targets)
        self.states = states

    def close(
        self, number: int, sent: Mapping[str, pb.ExchangeRequest], state: State, *, targets: bool = True
    ) -> tuple[Mapping[str, bytes], State]:
        """Return what a round closed with these contributions is answered with, and the method's state after it."""
        each = [sent[name] for name in self.experiment.names if name in sent]
        inputs = RoundInputs(
            students=tuple(name for name in self.experiment.names if name in sent),
            outputs={"logits": torch.stack([decode(one.batch.outputs["logits"]) for one in each])},
            labels=decode(each[0].batch.labels),
            held_out={"logits": torch.stack([decode(one.held_out.outputs["logits"]) for one in each])}
            if each[0].HasField("held_out")
            else {},
            held_out_labels=decode(each[0].held_out.labels) if each[0].HasField("held_out") else None,
            state=state,
            include_missing=self.experiment.exchange.journal.keep == "all" or len(each) < len(self.experiment.names),
        )
        made = self._aggregator.targets(inputs) if targets else Targets(shared={}, state=state)
        arrays = dict(made.each or {})
        if made.shared is not None:
            arrays[""] = made.shared
        replies = {
            name: append_checksum(
                pb.ExchangeResponse(
                    targets=pb.Targets(
                        round=number, targets={key: encode(value, "float32") for key, value in values.items()}
                    )
                )
            )
            for name, values in arrays.items()
        }
        return replies, made.state


def reply_to(replies: Mapping[str, bytes], student: str) -> bytes:
    return replies[student] if student in replies else replies[""]


@dataclass
class Ledger:
    """The facts that are never contradicted, over all restarts of everything.

    With `on_absence: wait` a round is closed with everybody, so its targets are those of the undisturbed run.
    """

    reference: Reference
    closed: dict[int, Mapping[str, bytes]] = field(default_factory=dict)
    last_session: int = 0
    sessions: dict[int, str] = field(default_factory=dict)
    published: dict[tuple[str, int], pb.ExchangeRequest] = field(default_factory=dict)
    contributors: dict[int, tuple[str, ...]] = field(default_factory=dict)
    answers: int = 0
    final: dict[str, bytes] = field(default_factory=dict)

    def admitted(self, session_id: int, student: str) -> None:
        if session_id <= self.last_session:
            raise Violation(f"session {session_id} of {student} is not newer than session {self.last_session}")
        self.last_session = session_id
        self.sessions[session_id] = student

    def sent(self, student: str, message: pb.ExchangeRequest) -> None:
        """A student publishes; whatever process of it does, it is the same."""
        known = self.published.setdefault((student, message.round), message)
        if known != message:
            raise Violation(f"student {student} publishes in round {message.round} what it had not published before")

    def decided(self, number: int, students: tuple[str, ...]) -> None:
        """The server makes a round's targets of these students' contributions."""
        if len(set(students)) != len(students):
            raise Violation(f"round {number}: a student is counted twice in {students}")
        self.contributors[number] = students

    def journalled(self, number: int, replies: Mapping[str, bytes]) -> None:
        """A round is on the disk."""
        if number in self.closed:
            raise Violation(f"round {number} is decided a second time")
        if number != len(self.closed):
            raise Violation(f"round {number} is decided, but the first open one is {len(self.closed)}")
        self.check_closed(number, replies)
        self.closed[number] = dict(replies)

    def check_closed(self, number: int, replies: Mapping[str, bytes]) -> None:
        if replies != self.reference.replies[number]:
            raise Violation(f"round {number}: its targets are not those of the expected contributions")

    def answered(self, session_id: int, number: int, reply: bytes) -> None:
        """The server sends targets."""
        self._check_answer(self.sessions[session_id], number, reply, "is sent")

    def received(self, student: str, number: int, targets: pb.Targets) -> None:
        """A student learns from targets, as those of a round."""
        self.answers += 1
        self._check_answer(student, number, append_checksum(pb.ExchangeResponse(targets=targets)), "takes")

    def finished(self, student: str, state: bytes) -> None:
        self.check_final(student, state)
        self.final[student] = state

    def check_final(self, student: str, state: bytes) -> None:
        if state != self.reference.states[student]:
            raise Violation(f"student {student} ends with another state than in the undisturbed run")

    def _check_answer(self, student: str, number: int, reply: bytes, what: str) -> None:
        replies = self.closed.get(number)
        if replies is None:
            raise Violation(f"{student} {what} targets of round {number}, which is not journalled")
        if reply != reply_to(replies, student):
            raise Violation(f"{student} {what} other targets of round {number} than were decided")


@dataclass
class GoingOn(Ledger):
    """The rule of `on_absence: proceed`: a round is a function of the participants with which it was closed."""

    method_state: State = field(default_factory=dict)

    def check_closed(self, number: int, replies: Mapping[str, bytes]) -> None:
        students = self.contributors[number]
        sent = {name: self.published[name, number] for name in students}
        enough = len(students) >= self.reference.experiment.exchange.quorum
        expected, self.method_state = self.reference.close(number, sent, self.method_state, targets=enough)
        if replies != expected:
            raise Violation(f"round {number}: its targets are not those of the contributions of {', '.join(students)}")

    def check_final(self, student: str, state: bytes) -> None:
        expected = first_state(self.reference.experiment.seed, student)
        for number in range(self.reference.rounds):
            expected = learn(expected, pb.ExchangeResponse.FromString(reply_to(self.closed[number], student)).targets)
        if state != expected:
            raise Violation(f"student {student} ends with another state than the journalled targets lead to")
