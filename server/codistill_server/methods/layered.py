"""Students whose classifiers on hidden layers teach one another."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from codistill.methods.aggregator import LOGITS, Arrays, Output, RoundInputs, Targets
from codistill_server.ensembles import dense

__all__ = ["Dense"]


class Dense:
    """DCM (Yao & Sun 2020): to each classifier its peers' mean probabilities at its stage, and at the other stages.

    Args:
        auxiliary: how many classifiers a student has besides the final one.
    """

    heavy = False
    teacher: Mapping[str, Output] = {}

    def __init__(self, auxiliary: int) -> None:
        self._names = [*(f"logits/stage{number}" for number in range(1, auxiliary + 1)), "logits"]
        self.student: Mapping[str, Output] = dict.fromkeys(self._names, LOGITS)

    def targets(self, gathered: RoundInputs) -> Targets:
        """Returns to each `same` and `other`, [B, S, C], of S stages with the final classifier last."""
        logits = torch.stack([gathered.outputs[name] for name in self._names], 1)
        shared = _arrays(*dense.pooled_dense_probabilities(logits)) if gathered.include_absent else None
        nothing: Arrays = {}
        if len(gathered.students) < 2:  # a student has no peers, and whoever asks later learns from it
            return Targets(shared=shared or {}, each=dict.fromkeys(gathered.students, nothing))
        same, other = dense.dense_probabilities(logits)
        each = {student: _arrays(same[place], other[place]) for place, student in enumerate(gathered.students)}
        return Targets(each=each, shared=shared)


def _arrays(same: torch.Tensor, other: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"same": same.transpose(0, 1), "other": other.transpose(0, 1)}
