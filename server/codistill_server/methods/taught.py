"""Students that learn from a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from codistill.methods.aggregator import LOGITS, NOTHING, Arrays, Output, RoundInputs, Targets
from codistill_server import ensembles

__all__ = ["BornAgain", "Taught", "TaughtMutual"]


class Taught:
    """One teacher, whose outputs are the targets of all students, as they are."""

    heavy = False
    student: Mapping[str, Output] = {}

    def __init__(self, outputs: Mapping[str, Output]) -> None:
        self.teacher = outputs

    def targets(self, gathered: RoundInputs) -> Targets:
        """Returns the teacher's outputs, for all."""
        for outputs in gathered.teachers.values():
            return Targets(shared=outputs)
        return NOTHING


class BornAgain:
    """Born-again networks (Furlanello et al. 2018): to each student the logits of its own teacher.

    Args:
        students: the run's, in order.
        teachers: theirs, in the same order.
    """

    heavy = False
    student: Mapping[str, Output] = {}
    teacher: Mapping[str, Output] = {"logits": LOGITS}

    def __init__(self, students: Sequence[str], teachers: Sequence[str]) -> None:
        self._teachers = dict(zip(students, teachers, strict=False))

    def targets(self, gathered: RoundInputs) -> Targets:
        """Returns to each student `logits`, [B, C], whether it contributed or will ask later."""
        nothing: Arrays = {}
        each = {student: gathered.teachers.get(teacher, nothing) for student, teacher in self._teachers.items()}
        return Targets(each=each)


class TaughtMutual:
    """FDDML and HDDML (Lukman & Yang 2022): the teacher's logits, and of two students each other's probabilities.

    Without one of the students there is nothing to learn; without the teacher, from each other.

    Args:
        taught: the students that the teacher teaches.
    """

    heavy = False
    student: Mapping[str, Output] = {"logits": LOGITS}
    teacher: Mapping[str, Output] = {"logits": LOGITS}

    def __init__(self, taught: Sequence[str]) -> None:
        self._taught = frozenset(taught)

    def targets(self, gathered: RoundInputs) -> Targets:
        """Returns to each student `probabilities` [B, C], and to those that are taught `logits` [B, C]."""
        if len(gathered.students) < 2:
            return NOTHING
        probabilities, _ = ensembles.peer_probabilities(gathered.outputs["logits"])
        each: dict[str, Arrays] = {}
        for position, student in enumerate(gathered.students):
            taught = list(gathered.teachers.values()) if student in self._taught else []
            of_teacher = {"logits": taught[0]["logits"]} if taught else {}
            each[student] = {"probabilities": probabilities[position], **of_teacher}
        return Targets(each=each)
