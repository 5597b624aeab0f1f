"""A teacher's outputs as targets."""

from __future__ import annotations

from collections.abc import Mapping

from codistill.methods.aggregator import NOTHING, Output, RoundInputs, Targets

__all__ = ["Relay"]


class Relay:
    """The outputs of one teacher, unchanged, as the targets of all students.

    Args:
        outputs: the outputs that the teacher publishes, by name.
    """

    heavy = False
    student: Mapping[str, Output] = {}

    def __init__(self, outputs: Mapping[str, Output]) -> None:
        self.teacher = outputs

    def targets(self, inputs: RoundInputs) -> Targets:
        """Return the teacher's outputs for all; nothing if the round closed without the teacher."""
        for outputs in inputs.teachers.values():
            return Targets(shared=outputs)
        return NOTHING
