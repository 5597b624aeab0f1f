"""Validation of a participant's report, before any of it is shown."""

from __future__ import annotations

import math

from codistill.v1 import distillation_pb2 as pb
from codistill.wire.times import LONGEST, is_valid
from codistill_server.errors import RequestRejected
from codistill_server.rounds.actions import Status

__all__ = ["check_counts", "check_values"]


def check_counts(request: pb.ReportRequest, total_rounds: int, total_steps: int) -> None:
    """Validate the rounds and steps that a report names.

    Args:
        request: the report.
        total_rounds: the run's.
        total_steps: the run's.

    Raises:
        RequestRejected: one of them is larger than the run; the text names its field.
    """
    steps = {"steps_trained": request.steps_trained}
    steps |= {
        f"measurements.{index}.steps_trained": measurement.steps_trained
        for index, measurement in enumerate(request.measurements)
    }
    rounds = {"round": request.round}
    durable = {"durable_round": request.durable_round}
    for counts, largest in ((steps, total_steps), (rounds, total_rounds), (durable, request.round)):
        for field, count in counts.items():
            if count > largest:
                raise RequestRejected(
                    Status.INVALID_ARGUMENT, f"{field}: {count} is not allowed; allowed: 0 to {largest}"
                )


def check_values(request: pb.ReportRequest) -> None:
    """Validate the measurements of a report.

    Raises:
        RequestRejected: a value is out of range; the text names its field.
    """
    epochs = request.epochs_trained
    if not (math.isfinite(epochs) and epochs >= 0):
        raise RequestRejected(
            Status.INVALID_ARGUMENT, f"epochs_trained: {epochs} is not allowed; allowed are 0 and above"
        )
    for field, time in (("step_time", request.step_time), ("wait_time", request.wait_time)):
        if not is_valid(time):
            raise RequestRejected(
                Status.INVALID_ARGUMENT,
                f"{field}: {time.seconds} s and {time.nanos} ns is not allowed; allowed: 0 to {LONGEST} s, with 0 to 999999999 ns",
            )
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
