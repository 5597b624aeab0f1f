"""The common part of students and teachers: its session, its reports, and the watchdog's marks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from codistill.config.data import Data
from codistill.config.experiment import Experiment
from codistill.config.fingerprint import identity
from codistill.process.watchdog import Watchdog
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.tensors import decode
from codistill.wire.times import seconds
from codistill_worker import data
from codistill_worker.participant import Participant, describe_device
from codistill_worker.training.outputs import Outputs, Published
from worker.support import CPU

Tiny = Callable[..., Experiment]
LOST = pb.Measurement(split=pb.SPLIT_TEST, steps_trained=3, accuracy=0.5, loss=1)


class Transport:
    """Records every message."""

    def __init__(self) -> None:
        self.messages: list[object] = []

    def join(self, request: pb.JoinRequest) -> pb.JoinResponse:
        self.messages.append(request)
        return pb.JoinResponse(session_id=1, run="tiny")

    def send(self, contribution: pb.ExchangeRequest) -> None:
        self.messages.append(contribution)

    def receive(self, number: int) -> pb.Targets:
        return pb.Targets(round=number)

    def report(self, report: pb.ReportRequest) -> None:
        self.messages.append(report)

    def undelivered(self) -> Sequence[pb.Measurement]:
        return [LOST]

    def leave(self, reason: pb.LeaveReason.ValueType, message: str) -> None:
        self.messages.append((reason, message))

    def close(self) -> None:
        pass


class Marks(Watchdog):
    def __init__(self) -> None:
        super().__init__()
        self.marks: list[tuple[str, float]] = []

    def begin(self, what: str, seconds: float) -> None:
        self.marks.append((what, seconds))


class Taking:
    """A participant with its transport, its marks and its clock."""

    def __init__(self, experiment: Experiment) -> None:
        self.transport, self.marks, self.now = Transport(), Marks(), 100.0
        self.participant = Participant(
            "old", "teacher", experiment, experiment.training, 3, self.transport, lambda: self.now, self.marks
        )


@pytest.fixture
def taking(tiny: Tiny) -> Taking:
    return Taking(
        tiny(training__hang_after=7, exchange={"connect_timeout": 100, "give_up_after": 1000, "dtype": "float16"})
    )


def test_every_wait_is_marked_with_its_limit(
    taking: Taking, tiny: Tiny, load_data: Callable[[Data], data.Dataset]
) -> None:
    participant = taking.participant
    dataset = load_data(tiny().data)
    participant.join(dataset, {"logits": (10,)}, CPU, first_step=2, total_steps=9, parameters=5, weights_sha256=b"w")
    participant.mark("the forward pass", 2)
    assert participant.receive("waiting for the targets", 3).round == 3
    participant.report(4, 3)
    participant.leave(pb.LEAVE_REASON_FINISHED, "done", 9)
    assert taking.marks.marks == [
        ("teacher 'old' at joining the run, step 2", 100 + 60 + 7),
        ("teacher 'old' at the forward pass, step 2", 7),
        ("teacher 'old' at waiting for the targets, step 3", 1000 + 60 + 7),
        ("teacher 'old' at reporting, step 4", 1000 + 60 + 7),
        ("teacher 'old' at saying goodbye, step 9", 1000 + 60 + 7),
    ]
    join = taking.transport.messages[0]
    assert isinstance(join, pb.JoinRequest)
    assert (join.participant, join.weights_sha256, join.parameters) == ("old", b"w", 5)
    assert (join.first_round, join.total_rounds, join.steps_trained, join.total_steps) == (2, 9, 2, 9)
    assert join.data.data_sha256.hex() == dataset.fingerprint()


def test_the_identity_is_that_of_the_experiment(tiny: Tiny) -> None:
    experiment = tiny()
    assert Taking(experiment).participant.identity == identity(experiment)


def test_outputs_have_the_experiments_dtype(taking: Taking) -> None:
    outputs = Outputs(torch.tensor([4, 7]), torch.tensor([0, 1]), {"logits": torch.ones(2, 10)})
    taking.participant.publish(Published(3, outputs))
    (sent,) = taking.transport.messages
    assert isinstance(sent, pb.ExchangeRequest)
    assert (sent.round, sent.HasField("held_out")) == (3, False)
    assert decode(sent.batch.ids).tolist() == [4, 7]
    assert decode(sent.batch.labels).tolist() == [0, 1]
    assert decode(sent.batch.outputs["logits"]).dtype is torch.float16


def test_a_measurement_is_reported_once(taking: Taking) -> None:
    participant, measurement = (
        taking.participant,
        pb.Measurement(split=pb.SPLIT_TEST, steps_trained=6, accuracy=0.5, loss=1),
    )
    participant.measurements.append(measurement)
    assert participant.undelivered() == [LOST, measurement]
    participant.report(6, 5, step_seconds=0.5, wait_seconds=0.25)
    participant.report(7, 6)
    reports = [each for each in taking.transport.messages if isinstance(each, pb.ReportRequest)]
    assert [list(report.measurements) for report in reports] == [[measurement], []]
    assert [(report.steps_trained, report.epochs_trained) for report in reports] == [(6, 2.0), (7, 7 / 3)]
    assert [(report.round, report.durable_round) for report in reports] == [(6, 5), (7, 6)]
    assert [(seconds(report.step_time), seconds(report.wait_time)) for report in reports] == [(0.5, 0.25), (0, 0)]
    assert [report.HasField("step_time") for report in reports] == [True, False]
    assert [report.HasField("wait_time") for report in reports] == [True, False]


def test_without_an_exchange_it_reports_steps_and_no_rounds(
    tiny: Tiny, load_data: Callable[[Data], data.Dataset]
) -> None:
    experiment = tiny(distillation={"method": "independent"})
    assert not experiment.distillation.exchanges
    taking = Taking(experiment)
    taking.participant.join(load_data(experiment.data), {}, CPU, first_step=4, total_steps=9, parameters=5)
    taking.participant.report(6, 5)
    join, report = taking.transport.messages
    assert isinstance(join, pb.JoinRequest)
    assert isinstance(report, pb.ReportRequest)
    assert (join.first_round, join.total_rounds, join.steps_trained, join.total_steps) == (0, 0, 4, 9)
    assert (report.round, report.durable_round, report.steps_trained, report.epochs_trained) == (0, 0, 6, 2.0)


def test_a_round_is_that_of_its_step(tiny: Tiny) -> None:
    """Steps 3, 5 and 7 exchange; a restart at a step between needs the round after it."""
    taking = Taking(tiny(distillation={"method": "cross_architecture", "every": 2, "start_epoch": 1}))
    for step, number in ((3, 0), (5, 1), (7, 2)):
        taking.participant.publish(Published(step, Outputs(torch.tensor([0]), torch.tensor([1]), {})))
        assert taking.participant.receive("waiting", step).round == number
    taking.participant.report(6, 4)
    *sent, report = taking.transport.messages
    assert [each.round for each in sent if isinstance(each, pb.ExchangeRequest)] == [0, 1, 2]
    assert isinstance(report, pb.ReportRequest)
    assert (report.round, report.durable_round, report.steps_trained) == (2, 1, 6)


def test_a_report_is_due_after_a_second(taking: Taking) -> None:
    assert not taking.participant.report_due(100.9)
    assert taking.participant.report_due(101.0)
    taking.now = 101.0
    taking.participant.report(1, 0)
    assert not taking.participant.report_due(101.9)


def test_a_gpu_is_described_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    assert describe_device(CPU) == "cpu"
    assert describe_device(torch.device("cuda", 1)) == "cuda:1 (NVIDIA H100)"
