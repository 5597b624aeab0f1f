"""Deep mutual learning (Zhang et al. 2018): every student mimics the others' probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from codistill.config.methods import Dml
from codistill.methods.aggregator import LOGITS, Aggregator, Output, RoundInputs, Targets
from codistill_server import ensembles

__all__ = ["aggregator"]


def aggregator(settings: Dml, students: Sequence[str], teachers: Sequence[str]) -> Aggregator:
    """Return an aggregator that gives each student the mean of the others' probabilities, [B, C]."""
    del students, teachers
    return _PeerMean(settings.temperature)


class _PeerMean:
    """The mean of the peers' probabilities, and how far the peers are from it.

    The mean over the others of KL(p_l ‖ p_k) is KL(mean p_l ‖ p_k) plus a divergence of the others among themselves. That
    is one number per sample. It is sent too, so that the student can report the pairwise value.
    """

    heavy = False
    student: Mapping[str, Output] = {"logits": LOGITS}
    teacher: Mapping[str, Output] = {}

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature

    def targets(self, inputs: RoundInputs) -> Targets:
        """Return `probabilities` [B, C] and `divergence` [B], in nats, for each student."""
        logits = inputs.outputs["logits"]
        probabilities, divergence = ensembles.peer_probabilities(logits, self._temperature)
        by_student = {
            student: {"probabilities": probabilities[position], "divergence": divergence[position]}
            for position, student in enumerate(inputs.students)
        }
        if not inputs.include_missing:
            return Targets(each=by_student)
        probabilities, divergence = ensembles.pooled_probabilities(logits, self._temperature)
        return Targets(each=by_student, shared={"probabilities": probabilities, "divergence": divergence})
