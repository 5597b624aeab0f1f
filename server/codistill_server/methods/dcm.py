"""Dense cross-layer mutual distillation (Yao & Sun 2020): classifiers on hidden layers teach one another too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from codistill.config.methods import Dcm
from codistill.methods.aggregator import LOGITS, Aggregator, Arrays, Output, RoundInputs, Targets
from codistill_server import ensembles

__all__ = ["aggregator"]


def aggregator(settings: Dcm, students: Sequence[str], teachers: Sequence[str]) -> Aggregator:
    """Return an aggregator that gives each classifier its peers' mean probabilities at its stage and at the others."""
    del students, teachers
    return _StageMeans(settings.stages)


class _StageMeans:
    """Means of the peers' probabilities by stage.

    Args:
        auxiliary: how many classifiers a student has besides the final one.
    """

    heavy = False
    teacher: Mapping[str, Output] = {}

    def __init__(self, auxiliary: int) -> None:
        self._names = [*(f"logits/stage{stage}" for stage in range(1, auxiliary + 1)), "logits"]
        self.student: Mapping[str, Output] = dict.fromkeys(self._names, LOGITS)

    def targets(self, inputs: RoundInputs) -> Targets:
        """Return `same` and `other` for each student, [B, S, C], of S stages with the final classifier last."""
        logits = torch.stack([inputs.outputs[name] for name in self._names], 1)
        shared = _arrays(*ensembles.pooled_dense_probabilities(logits)) if inputs.include_missing else None
        nothing: Arrays = {}
        if len(inputs.students) < 2:  # a single student has no peers; those that ask later learn from it
            return Targets(shared=shared or {}, each=dict.fromkeys(inputs.students, nothing))
        same, other = ensembles.dense_probabilities(logits)
        by_student = {
            student: _arrays(same[position], other[position]) for position, student in enumerate(inputs.students)
        }
        return Targets(each=by_student, shared=shared)


def _arrays(same: torch.Tensor, other: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the named targets of one student from [S, B, C]."""
    return {"same": same.transpose(0, 1), "other": other.transpose(0, 1)}
