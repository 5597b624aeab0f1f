"""Half deep distillation mutual learning (Lukman & Yang 2022): a teacher for the second of two students."""

from __future__ import annotations

from codistill.config.methods import Hddml
from codistill.methods import Objective, StudentContext
from codistill_worker.methods.teacher_and_peer import TeacherAndPeerObjective

__all__ = ["objective"]


def objective(settings: Hddml, context: StudentContext) -> Objective:
    """Return the loss of the labels and the other student, and of the teacher where its logits are sent."""
    return TeacherAndPeerObjective(settings, context)
