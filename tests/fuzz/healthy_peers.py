"""Healthy students beside the fuzzing: they train nothing, but each target that they get must be right to the bit."""

from __future__ import annotations

import threading
import time

import torch

from codistill.config.experiment import Experiment
from codistill.methods.aggregator import RoundInputs
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.checksum import append_checksum
from codistill.wire.tensors import encode
from codistill.wire.times import duration
from codistill_server import methods
from fuzz.endpoints import Endpoint
from server.support import contribution, join_request, logits_of

TRAIN_SAMPLES = 10**9  # and as many rounds; a campaign comes nowhere near their end
_REPORT_EVERY = 20


def targets(experiment: Experiment, round_number: int) -> bytes:
    """Return the data of a round's targets: a pure function of what the students publish in it."""
    aggregator = methods.create(experiment.distillation)
    assert aggregator is not None
    labels = torch.frombuffer(
        bytearray(contribution(experiment, experiment.names[0], round_number).batch.labels.data), dtype=torch.int64
    )
    outputs = torch.stack([logits_of(experiment, name, round_number) for name in experiment.names])
    made = aggregator.targets(RoundInputs(experiment.names, {"logits": outputs}, labels)).shared
    assert made is not None
    return encode(made["logits"], experiment.exchange.dtype).data


class Student(threading.Thread):
    """One healthy worker, as :class:`GrpcTransport` makes it, until it is stopped or something is wrong.

    Attributes:
        rounds: how many rounds' targets were right.
        slowest: the longest that a round took, in seconds.
        problem: what went wrong; None while all is well.
        traffic: the first messages that it sent, by rpc, as they go over the wire.
    """

    def __init__(self, endpoint: Endpoint, experiment: Experiment, name: str, pause: float = 0.02) -> None:
        super().__init__(name=f"healthy-{name}", daemon=True)
        self._experiment, self._student, self._pause = experiment, name, pause
        self._halt = threading.Event()
        self._transport = endpoint.transport(self._halt)
        self.rounds = 0
        self.slowest = 0.0
        self.problem: str | None = None
        self.traffic: list[tuple[str, bytes]] = []

    def run(self) -> None:
        try:
            self._train()
        except Exception as error:  # noqa: BLE001 - whatever it is, the campaign must hear of it
            if not self._halt.is_set():
                self.problem = f"{type(error).__name__}: {error}"

    def stop(self) -> None:
        self._halt.set()
        self.join(30)
        self._transport.close()

    def _train(self) -> None:
        request = join_request(self._experiment, self._student, data__train_samples=TRAIN_SAMPLES)
        self._record("Join", request)
        session_id = self._transport.join(request).session_id
        while not self._halt.is_set():
            round_number, started = self.rounds, time.monotonic()
            message = contribution(self._experiment, self._student, round_number)
            self._record("Exchange", message, str(session_id))
            self._transport.send(message)
            got = self._transport.receive(round_number).targets["logits"].data
            self.slowest = max(self.slowest, time.monotonic() - started)
            if got != targets(self._experiment, round_number):
                self.problem = f"student {self._student}, round {round_number}: the targets are not the pure function's"
                return
            self.rounds += 1
            if self.rounds % _REPORT_EVERY == 0:
                report = pb.ReportRequest(
                    steps_trained=self.rounds,
                    epochs_trained=1,
                    round=self.rounds,
                    durable_round=self.rounds,
                    step_time=duration(0.1),
                )
                report.measurements.add(split=pb.SPLIT_TEST, steps_trained=self.rounds, accuracy=0.5, loss=1.0)
                self._transport.report(report)
                self._record("Report", report)
                self._record(
                    "Leave", pb.LeaveRequest(session_id=session_id, reason=pb.LEAVE_REASON_STOPPED, message="bye")
                )
            self._halt.wait(self._pause)

    def _record(
        self,
        rpc: str,
        message: pb.JoinRequest | pb.ExchangeRequest | pb.ReportRequest | pb.LeaveRequest,
        context: str = "",
    ) -> None:
        if len(self.traffic) < 60:
            self.traffic.append((rpc, append_checksum(message, context)))
