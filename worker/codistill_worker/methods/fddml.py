"""Full deep distillation mutual learning (Lukman & Yang 2022): a teacher for both of two students."""

from __future__ import annotations

from codistill.config.methods import Fddml
from codistill.methods import Objective, StudentContext
from codistill_worker.methods.teacher_and_peer import TeacherAndPeerObjective

__all__ = ["objective"]


def objective(settings: Fddml, context: StudentContext) -> Objective:
    """Return the loss of the labels, the teacher and the other student."""
    return TeacherAndPeerObjective(settings, context)
