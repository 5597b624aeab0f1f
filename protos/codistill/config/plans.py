"""One participant's settings, with its overrides applied."""

from __future__ import annotations

from codistill.config.base import Section
from codistill.config.data import Data
from codistill.config.methods import Distillation
from codistill.config.participants import Student, Teacher
from codistill.config.training import Training

__all__ = ["StudentPlan", "TeacherPlan"]


class TeacherPlan(Section):
    """One teacher's settings with every override applied; see :meth:`codistill.config.experiment.Experiment.teacher_plan`."""

    teacher: Teacher
    data: Data
    training: Training
    distillation: Distillation


class StudentPlan(Section):
    """One student's settings with every override applied; see :meth:`codistill.config.experiment.Experiment.plan`."""

    student: Student
    data: Data
    training: Training
    distillation: Distillation
