"""Cross-architecture distillation, after Gao et al. (2019): the students learn from the mean of their probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from codistill.config.methods import CrossArchitecture
from codistill.methods.aggregator import LOGITS, Aggregator, Output, RoundInputs, Targets
from codistill_server import ensembles

__all__ = ["aggregator"]


def aggregator(settings: CrossArchitecture, students: Sequence[str], teachers: Sequence[str]) -> Aggregator:
    """Return an aggregator that gives all students the mean of their probabilities, [B, C]."""
    del students, teachers
    return _Mean(settings.temperature)


class _Mean:
    heavy = False
    student: Mapping[str, Output] = {"logits": LOGITS}
    teacher: Mapping[str, Output] = {}

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature

    def targets(self, inputs: RoundInputs) -> Targets:
        """Return `probabilities` [B, C] for all."""
        probabilities = ensembles.mean_probabilities(inputs.outputs["logits"], self._temperature)
        return Targets(shared={"probabilities": probabilities})
