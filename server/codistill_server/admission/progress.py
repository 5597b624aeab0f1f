"""Validation of a student's report, before any of it is shown."""

from __future__ import annotations

import math

from codistill.v1 import distillation_pb2 as pb
from codistill_server.errors import RequestRejected
from codistill_server.rounds.actions import Status

__all__ = ["check_rounds", "check_values"]


def check_rounds(request: pb.ReportRequest, last_round: int) -> None:
    """Validate the rounds that a report names.

    Args:
        request: the report.
        last_round: the run's last round.

    Raises:
        RequestRejected: one of them is after the last; the text names its field.
    """
    rounds = {"round": request.round, "durable_round": request.durable_round}
    rounds |= {
        f"measurements.{index}.round": measurement.round for index, measurement in enumerate(request.measurements)
    }
    for field, round_number in rounds.items():
        if round_number > last_round:
            raise RequestRejected(
                Status.INVALID_ARGUMENT, f"{field}: {round_number} is not allowed; allowed: 0 to {last_round}"
            )


def check_values(request: pb.ReportRequest) -> None:
    """Validate the measurements of a report.

    Raises:
        RequestRejected: a value is out of range; the text names its field.
    """
    amounts = {"epoch": request.epoch, "step_seconds": request.step_seconds, "wait_seconds": request.wait_seconds}
    for field, value in amounts.items():
        if not (math.isfinite(value) and value >= 0):
            raise RequestRejected(Status.INVALID_ARGUMENT, f"{field}: {value} is not allowed; allowed are 0 and above")
    for index, measurement in enumerate(request.measurements):
        if measurement.split not in (pb.SPLIT_TRAIN, pb.SPLIT_TEST):
            raise RequestRejected(
                Status.INVALID_ARGUMENT,
                f"measurements.{index}.split: {measurement.split} is not allowed; allowed: SPLIT_TRAIN, SPLIT_TEST",
            )
        if not 0 <= measurement.accuracy <= 1:
            raise RequestRejected(
                Status.INVALID_ARGUMENT,
                f"measurements.{index}.accuracy: {measurement.accuracy} is not allowed; allowed: 0 to 1",
            )
        for name in ("loss", "distillation_loss"):
            value: float = getattr(measurement, name)
            if not math.isfinite(value):
                raise RequestRejected(
                    Status.INVALID_ARGUMENT,
                    f"measurements.{index}.{name}: {value} is not allowed; allowed are finite values",
                )
