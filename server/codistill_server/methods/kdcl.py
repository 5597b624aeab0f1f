"""KDCL (Guo et al. 2020): every student learns from one ensemble's soft target.

The ensemble that the experiment names is the function of that name in :mod:`codistill_server.ensembles.kdcl`. Its row in
:data:`codistill.config.methods.KDCL_ENSEMBLES` says how to call it:

* ``(logits, labels)`` returns the target;
* ``(logits, covariance, measured)``, where the row has ``held_out``: see :func:`codistill_server.ensembles.kdcl.general`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch

from codistill.config.methods import KDCL_ENSEMBLES, Kdcl
from codistill.methods.aggregator import LOGITS, Aggregator, Arrays, Output, RoundInputs, Targets
from codistill_server.ensembles import kdcl as ensembles

__all__ = ["Ensemble", "aggregator"]

_COVARIANCE = "covariance/"

_Labelled: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_Measured: TypeAlias = Callable[[torch.Tensor, torch.Tensor, Sequence[int]], torch.Tensor]


def aggregator(settings: Kdcl, students: Sequence[str], teachers: Sequence[str]) -> Aggregator:
    """Return an aggregator that gives all students the ensemble's logits, [B, C]."""
    del students, teachers
    ensemble, row = getattr(ensembles, settings.ensemble), KDCL_ENSEMBLES[settings.ensemble]
    return _HeldOutEnsemble(ensemble, row.heavy) if row.held_out else Ensemble(ensemble, row.heavy)


class Ensemble:
    """One target for all, from the logits and labels of a batch.

    Args:
        ensemble: makes the target.
        heavy: whether that takes milliseconds.
    """

    student: Mapping[str, Output] = {"logits": LOGITS}
    teacher: Mapping[str, Output] = {}

    def __init__(self, ensemble: _Labelled, heavy: bool) -> None:
        self.heavy = heavy
        self._ensemble = ensemble

    def targets(self, inputs: RoundInputs) -> Targets:
        """Return the ensemble's `logits`, [B, C], for all."""
        return Targets(shared={"logits": self._ensemble(inputs.outputs["logits"], inputs.labels)})


class _HeldOutEnsemble:
    """One target for all, by errors that are measured on held-out samples once an epoch; the mean before that.

    The state is the errors' covariance [M, M], float32, under a key that names the M students measured. The ensemble
    combines those of them that contribute; where none does, the target is the mean.
    """

    student: Mapping[str, Output] = {"logits": LOGITS}
    teacher: Mapping[str, Output] = {}

    def __init__(self, ensemble: _Measured, heavy: bool) -> None:
        self.heavy = heavy
        self._ensemble = ensemble

    def targets(self, inputs: RoundInputs) -> Targets:
        """Return the ensemble's `logits`, [B, C], for all."""
        state = inputs.state
        if inputs.held_out_labels is not None:
            total = ensembles.error_covariance(inputs.held_out["logits"], inputs.held_out_labels)
            mean = total / len(inputs.held_out_labels)
            # In the journal's precision from the start, so that a restart changes no bit.
            state = {_COVARIANCE + ",".join(inputs.students): mean.to(torch.float32)}
        return Targets(shared={"logits": self._target(inputs, state)}, state=state)

    def _target(self, inputs: RoundInputs, state: Arrays) -> torch.Tensor:
        students, logits = inputs.students, inputs.outputs["logits"]
        for key, covariance in state.items():
            names = key.removeprefix(_COVARIANCE).split(",")
            measured = [position for position, student in enumerate(students) if student in names]
            if measured:
                rows = [names.index(students[position]) for position in measured]
                return self._ensemble(logits, covariance.double()[rows][:, rows], measured)
        return ensembles.weighted_sum(logits, torch.full((len(students),), 1 / len(students), dtype=torch.float32))
