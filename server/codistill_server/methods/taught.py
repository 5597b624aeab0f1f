"""Students that learn from a teacher."""

from __future__ import annotations

from collections.abc import Mapping

from codistill_server.methods.mechanism import LOGITS, NOTHING, Gathered, Output, Targets

__all__ = ["Taught"]


class Taught:
    """One teacher, whose outputs are the targets of all students, as they are."""

    heavy = False
    student: Mapping[str, Output] = {}

    def __init__(self, outputs: Mapping[str, Output] | None = None) -> None:
        self.teacher = {"logits": LOGITS} if outputs is None else outputs

    def targets(self, gathered: Gathered) -> Targets:
        """Returns the teacher's outputs, for all."""
        for outputs in gathered.teachers.values():
            return Targets(shared=outputs)
        return NOTHING
