"""Shared by the tests of a student's loop: a transport that records, a clock, and loops on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from codistill.config.experiment import Experiment
from codistill.process.watchdog import Watchdog
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.tensors import decode, encode
from codistill_worker.student import StudentLoop
from codistill_worker.training.checkpoints import CheckpointStore

Tiny = Callable[..., Experiment]
NEWEST, BEST = "checkpoint.safetensors", "best.safetensors"


class RecordingTransport:
    """Answers at once, and records every message."""

    def __init__(self) -> None:
        self.joined: list[pb.JoinRequest] = []
        self.sent: list[pb.ExchangeRequest] = []
        self.received: list[int] = []
        self.target = "logits"
        self.reports: list[pb.ReportRequest] = []
        self.left: list[tuple[Any, str]] = []
        self.lost: list[pb.Measurement] = []

    def join(self, request: pb.JoinRequest) -> pb.JoinResponse:
        self.joined.append(request)
        return pb.JoinResponse(session_id=1, run="recorded")

    def send(self, contribution: pb.ExchangeRequest) -> None:
        self.sent.append(contribution)

    def receive(self, number: int) -> pb.Targets:
        logits = decode(self.sent[-1].batch.outputs["logits"]).float()
        assert self.sent[-1].round == number
        self.received.append(number)
        target = logits.roll(1, 0) / 2
        target = target if self.target == "logits" else target.softmax(-1)
        return pb.Targets(round=number, targets={self.target: encode(target, "float32")})

    def report(self, report: pb.ReportRequest) -> None:
        self.reports.append(report)

    def undelivered(self) -> Sequence[pb.Measurement]:
        return self.lost

    def leave(self, reason: pb.LeaveReason.ValueType, message: str) -> None:
        self.left.append((reason, message))

    def close(self) -> None:
        pass

    def measured(self, split: Any = None) -> list[pb.Measurement]:
        return [each for report in self.reports for each in report.measurements if split in (None, each.split)]


class Clock:
    """Goes on by `step` seconds each time it is read."""

    def __init__(self, step: float = 0.0) -> None:
        self.now = 100.0
        self.step = step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


@pytest.fixture
def learn(tmp_path: Path, load_data: Any) -> Callable[..., tuple[StudentLoop, RecordingTransport]]:
    def make(
        experiment: Experiment,
        folder: str = "run",
        name: str = "cnn",
        clock: Clock | None = None,
        watchdog: Watchdog | None = None,
    ) -> tuple[StudentLoop, RecordingTransport]:
        plan, transport = experiment.plan(name), RecordingTransport()
        store = CheckpointStore(tmp_path / folder)
        device, dataset = torch.device("cpu"), load_data(plan.data)
        return StudentLoop(experiment, plan, dataset, device, transport, store, clock or Clock(), watchdog), transport

    return make


def go(loop: StudentLoop, steps: int | None = None) -> None:
    while not loop.done and steps != 0:
        loop.begin_step()
        loop.end_step()
        steps = None if steps is None else steps - 1


def to_the_end(loop: StudentLoop) -> None:
    go(loop)
    loop.finish()
