"""A run as the server describes it."""

from __future__ import annotations

from codistill.v1 import distillation_pb2 as pb


def run_at(round_number: int, *, waiting: float = 0.0, complete: bool = False) -> pb.Run:
    student = pb.StudentStatus(
        name="cnn",
        model="resnet8",
        state=pb.STUDENT_STATE_FINISHED if complete else pb.STUDENT_STATE_PRESENT,
        round=round_number,
        epoch=round_number / 10,
        measurements=[pb.Measurement(split=pb.SPLIT_TEST, round=round_number, accuracy=0.912, loss=0.3)],
        step_seconds=0.0123,
        wait_seconds=0.0045,
    )
    slow = pb.StudentStatus(name="vit", model="vit", state=pb.STUDENT_STATE_ABSENT, round=round_number - 1)
    return pb.Run(
        name="digits",
        method="kdcl/min_logit",
        frontier=round_number,
        total_rounds=40,
        students=[student, slow],
        waiting_for=["vit"] if waiting else [],
        waiting_seconds=waiting,
        complete=complete,
    )
