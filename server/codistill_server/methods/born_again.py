"""Born-again networks (Furlanello et al. 2018): every student learns from its own previous generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from codistill.config.methods import BornAgain
from codistill.methods.aggregator import LOGITS, Aggregator, Arrays, Output, RoundInputs, Targets

__all__ = ["aggregator"]


def aggregator(settings: BornAgain, students: Sequence[str], teachers: Sequence[str]) -> Aggregator:
    """Return an aggregator that gives each student the logits of the teacher at its place, [B, C]."""
    del settings
    return _OwnTeachers(students, teachers)


class _OwnTeachers:
    heavy = False
    student: Mapping[str, Output] = {}
    teacher: Mapping[str, Output] = {"logits": LOGITS}

    def __init__(self, students: Sequence[str], teachers: Sequence[str]) -> None:
        self._teachers = dict(zip(students, teachers, strict=False))

    def targets(self, inputs: RoundInputs) -> Targets:
        """Return `logits` [B, C] for every student of the run: those that did not contribute may ask later."""
        nothing: Arrays = {}
        by_student = {student: inputs.teachers.get(teacher, nothing) for student, teacher in self._teachers.items()}
        return Targets(each=by_student)
