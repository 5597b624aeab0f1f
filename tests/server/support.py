"""Shared by the tests of the server's plumbing: an experiment, messages as workers send them, and a run in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from codistill import PROTOCOL_VERSION
from codistill.config.experiment import Experiment, parse
from codistill.config.fingerprint import identity, identity_sha256
from codistill.config.methods import Independent
from codistill.rundir.records import Happened, Record
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.checksum import append_checksum
from codistill.wire.tensors import encode
from codistill_server.coordinator import Coordinator, Submit, run_inline
from codistill_server.errors import RequestRejected
from codistill_server.observability.state import RunState
from codistill_server.rounds.actions import Status
from codistill_server.storage.journal import Journal

BATCH, CLASSES, HELD_OUT = 4, 3, 5
STEPS_PER_EPOCH, EPOCHS = 3, 4
TRAIN_SAMPLES = STEPS_PER_EPOCH * BATCH
TOTAL_STEPS = EPOCHS * STEPS_PER_EPOCH
# Where every step exchanges.
ROUNDS_PER_EPOCH, TOTAL_ROUNDS = STEPS_PER_EPOCH, TOTAL_STEPS
STUDENTS = ("ant", "bee")


class Clock:
    """Seconds that go by when told to."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Inbox:
    """The messages sent to a session."""

    def __init__(self) -> None:
        self.raw: list[bytes] = []
        self.ended: tuple[Status, str] | None = None

    def reply(self, reply: bytes) -> None:
        assert self.ended is None, "nothing is sent to a stream that has ended"
        self.raw.append(reply)

    def end(self, status: Status, message: str) -> None:
        assert self.ended is None, "a stream ends once"
        self.ended = status, message

    @property
    def replies(self) -> list[pb.ExchangeResponse]:
        return [pb.ExchangeResponse.FromString(raw) for raw in self.raw]

    @property
    def rounds(self) -> list[int]:
        return [reply.targets.round for reply in self.replies if reply.HasField("targets")]


def make_experiment(students: Sequence[str] = STUDENTS, **sections: Any) -> Experiment:
    """Return a small experiment on `CLASSES` classes.

    `section={...}` adds to a section, or takes its place where it names a method; other values replace.
    """
    document: dict[str, Any] = {
        "name": "small",
        "data": {"dataset": "somewhere:make", "classes": CLASSES},
        "training": {"epochs": EPOCHS, "batch_size": BATCH},
        "distillation": {"method": "kdcl", "ensemble": "min_logit"},
        "exchange": {"waiting_notice": 5},
        "students": [{"name": name, "model": "mlp"} for name in students],
    }
    for section, value in sections.items():
        adds = isinstance(value, dict) and "method" not in value
        document[section] = {**document.get(section, {}), **value} if adds else value
    return parse(yaml.safe_dump(document))


def general_experiment(**sections: Any) -> Experiment:
    return make_experiment(
        data={"held_out": HELD_OUT}, distillation={"method": "kdcl", "ensemble": "general"}, **sections
    )


def join_request(experiment: Experiment, participant: str, first_round: int = 0, /, **changes: Any) -> pb.JoinRequest:
    """Return a worker's join; `data__FIELD` changes its data set, `outputs` the shapes; the length follows from the samples."""
    exchanges, training = experiment.distillation.exchanges, experiment.training
    train_samples = changes.pop("data__train_samples", STEPS_PER_EPOCH * training.batch_size)
    steps_per_epoch = train_samples // training.batch_size
    schedule = experiment.distillation.exchange_schedule(max(steps_per_epoch, 1))
    total_steps = changes.pop("total_steps", min(training.epochs * steps_per_epoch, 2**64 - 1))
    request = pb.JoinRequest(
        protocol_version=PROTOCOL_VERSION,
        participant=participant,
        experiment_sha256=identity_sha256(experiment),
        experiment_json=identity(experiment),
        data=pb.DataFingerprint(
            data_sha256=bytes(32), train_samples=train_samples, classes=experiment.data.class_count
        ),
        outputs={"logits": pb.Shape(dims=[experiment.data.class_count])} if exchanges else {},
        first_round=first_round,
        total_rounds=min(schedule.rounds_before(total_steps), 2**64 - 1) if exchanges else 0,
        steps_trained=min(schedule.step_of(first_round), total_steps) if first_round else 0,
        total_steps=total_steps,
        parameters=10,
        device="cpu",
    )
    if "outputs" in changes:
        request.outputs.clear()
        for name, dims in changes.pop("outputs").items():
            request.outputs[name].dims.extend(dims)
    for key, value in changes.items():
        *path, field = key.split("__")
        changed = getattr(request, path[0]) if path else request
        if isinstance(value, list):
            getattr(changed, field).extend(value)
        else:
            setattr(changed, field, value)
    return request


def logits_of(experiment: Experiment, participant: str, round_number: int, rows: int | None = None) -> torch.Tensor:
    """Return the logits [rows, C] that a participant publishes in a round; each has its own."""
    position = experiment.names.index(participant)
    generator = torch.Generator().manual_seed(10_000 * position + round_number)
    rows = experiment.training.batch_size if rows is None else rows
    return 3 * torch.randn(rows, experiment.data.class_count, generator=generator)


def samples(
    logits: torch.Tensor, dtype: str = "float32", first: int = 0, labels: Sequence[int] | None = None
) -> pb.SampleOutputs:
    """Return samples numbered from `first` on, of classes 0, 1, 2, 0 … unless given."""
    rows = len(logits)
    classes = torch.tensor([row % CLASSES for row in range(rows)] if labels is None else labels, dtype=torch.int64)
    return pb.SampleOutputs(
        ids=encode(torch.arange(first, first + rows), "int64"),
        labels=encode(classes, "int64"),
        outputs={"logits": encode(logits, dtype)},
    )


def contribution(
    experiment: Experiment, participant: str, round_number: int, *, first: int | None = None, held_out: bool = False
) -> pb.ExchangeRequest:
    """Return what a participant publishes in a round; the samples are the round's own unless `first` says otherwise."""
    batch, dtype = experiment.training.batch_size, experiment.exchange.dtype
    first = round_number * batch if first is None else first
    message = pb.ExchangeRequest(
        round=round_number, batch=samples(logits_of(experiment, participant, round_number), dtype, first % (10 * batch))
    )
    if held_out:
        rows = experiment.data.held_out
        message.held_out.CopyFrom(samples(logits_of(experiment, participant, 1_000 + round_number, rows), dtype, 500))
    return message


def with_checksum(message: pb.ExchangeRequest, session_id: int) -> pb.ExchangeRequest:
    """Return a contribution as it is sent in a session, its checksum set."""
    return pb.ExchangeRequest.FromString(append_checksum(message, str(session_id)))


_open: list[Run] = []


def close_runs() -> None:
    """Close every run that a test has made; a test may close its own before."""
    while _open:
        _open.pop().coordinator.close()


class Run:
    """A coordinator, its journal, and what it told the outside."""

    def __init__(
        self,
        experiment: Experiment | None = None,
        path: Path | None = None,
        submit: Submit = run_inline,
        journal: Journal | None = None,
    ) -> None:
        self.experiment = experiment or make_experiment()
        self.clock = Clock()
        self.records: list[Record] = []
        self.journal = journal or Journal(path, identity(self.experiment))
        self.run_state = RunState(self.experiment, self.records.append, self.clock, Clock(1.7e9))
        self.coordinator = Coordinator(self.experiment, self.journal, self.run_state, submit, self.clock)
        self.completed = 0
        self.coordinator.on_complete = self._complete
        self.session_ids: dict[str, int] = {}
        self.inboxes: dict[str, Inbox] = {}
        _open.append(self)

    def _complete(self) -> None:
        self.completed += 1

    def join(self, participant: str, first_round: int = 0, /, **changes: Any) -> pb.JoinResponse:
        """Join and open the stream."""
        response = self.coordinator.join(join_request(self.experiment, participant, first_round, **changes))
        self.session_ids[participant], self.inboxes[participant] = response.session_id, Inbox()
        self.coordinator.open_stream(response.session_id, self.inboxes[participant])
        return response

    def join_all(self, first_round: int = 0) -> None:
        for participant in self.experiment.names:
            self.join(participant, first_round)

    def send(self, participant: str, message: pb.ExchangeRequest) -> None:
        self.coordinator.contribute(self.session_ids[participant], message, message.ByteSize())

    def contribute(self, participant: str, round_number: int, **options: Any) -> None:
        self.send(participant, contribution(self.experiment, participant, round_number, **options))

    def close_round(self, round_number: int, **options: Any) -> list[bytes]:
        """Have every participant contribute; return each one's answer."""
        for participant in self.experiment.names:
            self.contribute(participant, round_number, **options)
        return [self.inboxes[participant].raw[-1] for participant in self.experiment.names]

    def close_rounds(self) -> None:
        """Have every participant contribute to each round that is left, so that each may finish."""
        for number in range(self.coordinator.frontier, self.run_state.total_rounds):
            self.close_round(number)

    def report(self, participant: str, **fields: Any) -> None:
        self.coordinator.report(pb.ReportRequest(session_id=self.session_ids[participant], **fields))

    def leave(self, participant: str, reason: pb.LeaveReason.ValueType, message: str = "") -> None:
        self.coordinator.leave(
            pb.LeaveRequest(session_id=self.session_ids[participant], reason=reason, message=message)
        )

    def events(self, what: str) -> list[Happened]:
        return [record for record in self.records if isinstance(record, Happened) and record.what == what]


def refused(call: Callable[[], object]) -> RequestRejected:
    with pytest.raises(RequestRejected) as caught:
        call()
    return caught.value


def independent_experiment(students: tuple[str, ...] = ("ant",)) -> Experiment:
    return make_experiment().replace(
        distillation=Independent(), students=[{"name": name, "model": "mlp"} for name in students]
    )
