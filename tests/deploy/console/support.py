"""A run as the server describes it."""

from __future__ import annotations

from codistill.v1 import distillation_pb2 as pb
from codistill.wire.times import duration


def run_at(step: int, *, waiting: float = 0.0, complete: bool = False) -> pb.Run:
    """Return a run that exchanges at every second of its 40 steps."""
    student = pb.ParticipantStatus(
        name="cnn",
        role=pb.ROLE_STUDENT,
        model="resnet8",
        state=pb.PARTICIPANT_STATE_FINISHED if complete else pb.PARTICIPANT_STATE_CONNECTED,
        awaited=not complete,
        steps_trained=step,
        epochs_trained=step / 10,
        measurements=[pb.Measurement(split=pb.SPLIT_TEST, steps_trained=step, accuracy=0.912, loss=0.3)],
        step_time=duration(0.0123),
        wait_time=duration(0.0045),
    )
    slow = pb.ParticipantStatus(
        name="vit",
        role=pb.ROLE_STUDENT,
        model="vit",
        state=pb.PARTICIPANT_STATE_DISCONNECTED,
        awaited=True,
        steps_trained=step - 1,
    )
    return pb.Run(
        name="digits",
        method="kdcl/min_logit",
        frontier=step // 2,
        total_rounds=20,
        steps_trained=step,
        total_steps=40,
        participants=[student, slow],
        waiting_for=["vit"] if waiting else [],
        waiting_time=duration(waiting),
        complete=complete,
    )
