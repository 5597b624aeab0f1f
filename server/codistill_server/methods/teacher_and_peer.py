"""Targets of two students that learn from each other and from a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from codistill.methods.aggregator import LOGITS, NOTHING, Arrays, Output, RoundInputs, Targets
from codistill_server import ensembles

__all__ = ["TeacherAndPeer"]


class TeacherAndPeer:
    """FDDML and HDDML (Lukman & Yang 2022): the teacher's logits, and the other student's probabilities.

    A round that closed without one of the students has no targets; without the teacher, only those of the peer.

    Args:
        with_teacher: the students that learn from the teacher.
    """

    heavy = False
    student: Mapping[str, Output] = {"logits": LOGITS}
    teacher: Mapping[str, Output] = {"logits": LOGITS}

    def __init__(self, with_teacher: Sequence[str]) -> None:
        self._with_teacher = frozenset(with_teacher)

    def targets(self, inputs: RoundInputs) -> Targets:
        """Return `probabilities` [B, C] for each student, and `logits` [B, C] for those that learn from the teacher."""
        if len(inputs.students) < 2:
            return NOTHING
        probabilities, _ = ensembles.peer_probabilities(inputs.outputs["logits"])
        by_student: dict[str, Arrays] = {}
        for position, student in enumerate(inputs.students):
            teachers = list(inputs.teachers.values()) if student in self._with_teacher else []
            of_teacher = {"logits": teachers[0]["logits"]} if teachers else {}
            by_student[student] = {"probabilities": probabilities[position], **of_teacher}
        return Targets(each=by_student)
