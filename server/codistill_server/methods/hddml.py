"""Half deep distillation mutual learning (Lukman & Yang 2022): a teacher for the second of two students."""

from __future__ import annotations

from collections.abc import Sequence

from codistill.config.methods import Hddml
from codistill.methods.aggregator import Aggregator
from codistill_server.methods.teacher_and_peer import TeacherAndPeer

__all__ = ["aggregator"]


def aggregator(settings: Hddml, students: Sequence[str], teachers: Sequence[str]) -> Aggregator:
    """Return an aggregator that gives each student its peer's probabilities, and the second student the teacher's logits."""
    del settings, teachers
    return TeacherAndPeer(students[1:])
