"""Students that teach one another: KDCL, deep mutual learning, and cross-architecture distillation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from codistill.config.methods import KDCL_ENSEMBLES, Kdcl
from codistill.methods.aggregator import LOGITS, Aggregator, Arrays, Output, RoundInputs, Targets
from codistill_server import ensembles

__all__ = ["Ensemble", "General", "Mean", "Mutual", "ensemble_of"]


class Ensemble:
    """KDCL (Guo et al. 2020): one target for all, by one of four ensembles."""

    student: Mapping[str, Output] = {"logits": LOGITS}
    teacher: Mapping[str, Output] = {}

    def __init__(self, ensemble: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], heavy: bool) -> None:
        self.heavy = heavy
        self._ensemble = ensemble

    def targets(self, gathered: RoundInputs) -> Targets:
        """Returns the ensemble's logits, [B, C], for all."""
        return Targets(shared={"logits": self._ensemble(gathered.outputs["logits"], gathered.labels)})


class General:
    """KDCL-General: weights by errors measured on held-out samples once an epoch, uniform before that.

    The state is the errors' covariance [M, M], float32, under a key that names the M students measured. Weights follow
    from it for whichever students contribute; one that was not measured has weight 0, unless nobody there was.
    """

    heavy = False
    student: Mapping[str, Output] = {"logits": LOGITS}
    teacher: Mapping[str, Output] = {}

    def targets(self, gathered: RoundInputs) -> Targets:
        """Returns the weighted sum of the logits, [B, C], for all."""
        state = gathered.state
        if gathered.held_out_labels is not None:
            total = ensembles.error_covariance(gathered.held_out["logits"], gathered.held_out_labels)
            mean = total / len(gathered.held_out_labels)
            # In the journal's precision from the start, so that a restart changes no bit.
            state = {_COVARIANCE + ",".join(gathered.students): mean.to(torch.float32)}
        weights = _weights_of(gathered.students, state)
        return Targets(shared={"logits": ensembles.weighted_sum(gathered.outputs["logits"], weights)}, state=state)


_COVARIANCE = "covariance/"


def _weights_of(students: tuple[str, ...], state: Arrays) -> torch.Tensor:
    """Returns the weights of some students by the state of `general`, [K], float32."""
    for key, covariance in state.items():
        measured = key.removeprefix(_COVARIANCE).split(",")
        known = [(position, measured.index(name)) for position, name in enumerate(students) if name in measured]
        if known:
            positions, rows = (list(each) for each in zip(*known, strict=True))
            weights = torch.zeros(len(students), dtype=torch.float64)
            weights[positions] = ensembles.weights_from_covariance(covariance.double()[rows][:, rows])
            return weights.to(torch.float32)
    return torch.full((len(students),), 1 / len(students), dtype=torch.float32)


class Mutual:
    """DML (Zhang et al. 2018): to each student the mean of the others' probabilities.

    The mean over the others of KL(p_l ‖ p_k) is KL(mean p_l ‖ p_k) plus a divergence of the others among themselves,
    one number per sample that is sent along, so that the student reports the pairwise value.
    """

    heavy = False
    student: Mapping[str, Output] = {"logits": LOGITS}
    teacher: Mapping[str, Output] = {}

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature

    def targets(self, gathered: RoundInputs) -> Targets:
        """Returns to each `probabilities` [B, C] and `divergence` [B]."""
        logits = gathered.outputs["logits"]
        probabilities, divergence = ensembles.peer_probabilities(logits, self._temperature)
        each = {
            student: {"probabilities": probabilities[position], "divergence": divergence[position]}
            for position, student in enumerate(gathered.students)
        }
        if not gathered.include_absent:
            return Targets(each=each)
        probabilities, divergence = ensembles.pooled_probabilities(logits, self._temperature)
        return Targets(each=each, shared={"probabilities": probabilities, "divergence": divergence})


class Mean:
    """Cross-architecture distillation, after Gao et al. (2019): one target, the mean of all students' probabilities."""

    heavy = False
    student: Mapping[str, Output] = {"logits": LOGITS}
    teacher: Mapping[str, Output] = {}

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature

    def targets(self, gathered: RoundInputs) -> Targets:
        """Returns `probabilities`, [B, C], for all."""
        return Targets(
            shared={"probabilities": ensembles.mean_probabilities(gathered.outputs["logits"], self._temperature)}
        )


def ensemble_of(settings: Kdcl) -> Aggregator:
    """Returns KDCL's half with the ensemble that the experiment chooses."""
    match settings.ensemble:
        case "general":
            return General()
        case name:
            return Ensemble(getattr(ensembles, name), heavy=KDCL_ENSEMBLES[name].heavy)
