"""The common part of students and teachers: their session with the run, their reports, and the watchdog's marks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping

import torch

from codistill import PROTOCOL_VERSION
from codistill.config.experiment import Experiment
from codistill.config.fingerprint import identity, identity_sha256
from codistill.config.training import Training
from codistill.peer.base import Transport
from codistill.process.gpus import OWN_GPU_VARIABLE
from codistill.process.watchdog import Watchdog
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.tensors import encode
from codistill.wire.times import duration
from codistill_worker.data import Dataset
from codistill_worker.training.outputs import Outputs, Published

__all__ = ["Participant", "describe_device"]

_REPORT_SECONDS = 1.0
_CALLS_SECONDS = 60.0  # of calls that are under way when a limit of the exchange is reached


class Participant:
    """One student or teacher of a run, as the run's server knows it.

    Every method that may take long marks its beginning for the watchdog.

    Args:
        name: of the student or teacher.
        role: "student" or "teacher", for the watchdog's message.
        experiment: the run's experiment.
        training: the participant's training settings.
        steps_per_epoch: of the run.
        transport: carries its outputs and its reports.
        clock: seconds that never go back.
        watchdog: ends the process if a mark stays for too long.

    Attributes:
        name: of the student or teacher.
        identity: the experiment's :func:`codistill.config.fingerprint.identity`.
        measurements: of the next report.
    """

    def __init__(
        self,
        name: str,
        role: str,
        experiment: Experiment,
        training: Training,
        steps_per_epoch: int,
        transport: Transport,
        clock: Callable[[], float] = time.monotonic,
        watchdog: Watchdog | None = None,
    ) -> None:
        self.name = name
        self.identity = identity(experiment)
        self.measurements: list[pb.Measurement] = []
        self._role = role
        self._identity_sha256 = identity_sha256(experiment)
        self._exchange = experiment.exchange
        self._exchanges = experiment.distillation.exchanges
        self._schedule = experiment.distillation.exchange_schedule(steps_per_epoch)
        self._steps_per_epoch = steps_per_epoch
        self._hang_after = training.hang_after
        self._transport = transport
        self._clock = clock
        self._watchdog = watchdog or Watchdog()
        self._reported_at = clock()

    def mark(self, activity: str, step: int, waiting: float = 0.0) -> None:
        """Mark for the watchdog that an activity begins; it may wait for others for `waiting` seconds."""
        self._watchdog.begin(f"{self._role} {self.name!r} at {activity}, step {step}", waiting + self._hang_after)

    def join(
        self,
        dataset: Dataset,
        shapes: Mapping[str, tuple[int, ...]],
        device: torch.device,
        *,
        first_step: int,
        total_steps: int,
        parameters: int,
        weights_sha256: bytes = b"",
    ) -> pb.JoinResponse:
        """Open the session with the run.

        Args:
            dataset: the run's data.
            shapes: of the outputs that will be published, without the samples, by name.
            device: where the participant computes.
            first_step: the first step that it has not trained.
            total_steps: steps in the run.
            parameters: of its model, trainable ones for a student.
            weights_sha256: of a teacher, its :func:`codistill_worker.training.weights.digest`.

        Raises:
            PeerError: the run cannot be reached, or rejects the participant.
        """
        request = pb.JoinRequest(
            protocol_version=PROTOCOL_VERSION,
            participant=self.name,
            experiment_sha256=self._identity_sha256,
            experiment_json=self.identity,
            data=pb.DataFingerprint(
                data_sha256=bytes.fromhex(dataset.fingerprint()),
                train_samples=len(dataset.train),
                classes=dataset.classes,
            ),
            outputs={name: pb.Shape(dims=dims) for name, dims in shapes.items()},
            first_round=self._rounds_before(first_step),
            total_rounds=self._rounds_before(total_steps),
            steps_trained=first_step,
            total_steps=total_steps,
            parameters=parameters,
            device=describe_device(device),
            weights_sha256=weights_sha256,
            lanes=[pb.LANE_GRPC],
            encodings=[pb.ENCODING_DENSE],
        )
        self.mark("joining the run", first_step, self._exchange.connect_timeout + _CALLS_SECONDS)
        return self._transport.join(request)

    def publish(self, published: Published) -> None:
        """Send the outputs of a step that exchanges, in the experiment's dtype; does not wait."""
        dtype = self._exchange.dtype
        held_out = published.held_out
        self._transport.send(
            pb.ExchangeRequest(
                round=self._rounds_before(published.step),
                batch=_encode_outputs(published.batch, dtype),
                held_out=None if held_out is None else _encode_outputs(held_out, dtype),
            )
        )

    def receive(self, activity: str, step: int) -> pb.Targets:
        """Return the targets of the step published last, waiting for them.

        Raises:
            PeerError: they did not arrive; see :meth:`codistill.peer.base.Transport.receive`.
        """
        self.mark(activity, step, self._longest_exchange)
        return self._transport.receive(self._rounds_before(step))

    def report_due(self, now: float) -> bool:
        """Return whether the last report is old enough for another; `now` is of the participant's clock."""
        return now - self._reported_at >= _REPORT_SECONDS

    def report(
        self, step: int, durable_step: int, *, step_seconds: float | None = None, wait_seconds: float | None = None
    ) -> None:
        """Send the measurements and the progress; does not wait.

        Args:
            step: the next step.
            durable_step: the first step that the participant needs again after a restart.
            step_seconds: median time of a step since the last report; None where unknown.
            wait_seconds: median time in which a step waited for its targets; None where unknown.
        """
        self._reported_at = self._clock()
        measurements, self.measurements = self.measurements, []
        self.mark("reporting", step, self._longest_exchange)
        self._transport.report(
            pb.ReportRequest(
                steps_trained=step,
                epochs_trained=step / self._steps_per_epoch,
                round=self._rounds_before(step),
                durable_round=self._rounds_before(durable_step),
                measurements=measurements,
                step_time=None if step_seconds is None else duration(step_seconds),
                wait_time=None if wait_seconds is None else duration(wait_seconds),
            )
        )

    def undelivered(self) -> list[pb.Measurement]:
        """Return the measurements that the server may not have yet."""
        return [*self._transport.undelivered(), *self.measurements]

    def leave(self, reason: pb.LeaveReason.ValueType, message: str, step: int) -> None:
        """Deliver the rest of the reports and end the session.

        Raises:
            PeerError: a student that finished cannot tell the server.
        """
        self.mark("saying goodbye", step, self._longest_exchange)
        self._transport.leave(reason, message)

    def _rounds_before(self, step: int) -> int:
        """Return the number of rounds before a step, which for one that exchanges is its round."""
        return self._schedule.rounds_before(step) if self._exchanges else 0

    @property
    def _longest_exchange(self) -> float:
        return self._exchange.give_up_after + _CALLS_SECONDS


def describe_device(device: torch.device) -> str:
    """Return a device's name for reports: "cpu", "cuda:0 (NVIDIA H100)"; a GPU's number is that among the run's."""
    if device.type == "cuda":
        return f"cuda:{os.environ.get(OWN_GPU_VARIABLE, device.index)} ({torch.cuda.get_device_name(device)})"
    return str(device)


def _encode_outputs(outputs: Outputs, dtype: str) -> pb.SampleOutputs:
    return pb.SampleOutputs(
        ids=encode(outputs.ids, "int64"),
        labels=encode(outputs.labels, "int64"),
        outputs={name: encode(value, dtype) for name, value in outputs.arrays.items()},
    )
