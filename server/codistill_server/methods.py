"""The server halves of the methods: each turns the outputs of a round into targets.

A half is a function of what the students published and of its own small state, and of nothing else, so that the
same round gives the same targets wherever and whenever it is computed. Halves are chosen by the experiment's
``distillation.method``; the worker's half of the same name turns the targets into a loss.

The arrays are named. KDCL publishes and answers ``logits`` [B, C]; DML publishes ``logits`` [B, C] and answers, to
each student, ``probabilities`` [B, C] and ``divergence`` [B].

A round may have been closed without some students. What is made then is made of those that are there, and whoever was
not, learns from all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from codistill.experiment import Distillation, Dml, Independent, Kdcl
from codistill_server import ensembles

__all__ = ["Gathered", "ServerHalf", "Targets", "create"]

Arrays = Mapping[str, torch.Tensor]


def _no_arrays() -> dict[str, torch.Tensor]:
    return {}


@dataclass(frozen=True)
class Gathered:
    """What the students published in a round, in the experiment's order.

    Attributes:
        students: the names of the K students that contributed.
        outputs: each named output of all students, [K, B, ...], float32.
        labels: the samples' classes, [B], int64.
        held_out: each named output for the held-out samples, [K, N, ...], float32; empty in most rounds.
        held_out_labels: their classes, [N], int64; None in most rounds.
        state: what the half returned with the round before; empty for the first.
        outsiders: whether students that did not contribute will ask for the targets.
    """

    students: tuple[str, ...]
    outputs: Arrays
    labels: torch.Tensor
    held_out: Arrays = field(default_factory=_no_arrays)
    held_out_labels: torch.Tensor | None = None
    state: Arrays = field(default_factory=_no_arrays)
    outsiders: bool = False


@dataclass(frozen=True)
class Targets:
    """What a round's targets are.

    Attributes:
        each: named arrays by student, where they differ.
        shared: named arrays for every student that has none of its own.
        state: float32 arrays to be handed back with the next round; journalled with this one.
    """

    shared: Arrays | None = None
    each: Mapping[str, Arrays] | None = None
    state: Arrays = field(default_factory=_no_arrays)


class ServerHalf(Protocol):
    """The server half of a method.

    Attributes:
        heavy: whether `targets` takes milliseconds, so that a server does it beside its event loop.
    """

    heavy: bool

    def targets(self, gathered: Gathered) -> Targets:
        """Returns the targets of one round."""
        ...


class _Kdcl:
    """KDCL (Guo et al. 2020): one target for all, by one of four ensembles."""

    def __init__(self, ensemble: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], heavy: bool) -> None:
        self.heavy = heavy
        self._ensemble = ensemble

    def targets(self, gathered: Gathered) -> Targets:
        return Targets(shared={"logits": self._ensemble(gathered.outputs["logits"], gathered.labels)})


class _KdclGeneral:
    """KDCL-General: weights by errors measured on held-out samples once an epoch, uniform before that.

    The state is the errors' covariance [M, M], float32, under a key that names the M students measured. Weights follow
    from it for whichever students contribute; one that was not measured has weight 0, unless nobody there was.
    """

    heavy = False

    def targets(self, gathered: Gathered) -> Targets:
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


class _Dml:
    """DML (Zhang et al. 2018): to each student the mean of the others' probabilities.

    The mean over the others of KL(p_l ‖ p_k) is KL(mean p_l ‖ p_k) plus a divergence of the others among themselves,
    one number per sample that is sent along, so that the student reports the pairwise value.
    """

    heavy = False

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature

    def targets(self, gathered: Gathered) -> Targets:
        logits = gathered.outputs["logits"]
        probabilities, divergence = ensembles.peer_probabilities(logits, self._temperature)
        each = {
            student: {"probabilities": probabilities[position], "divergence": divergence[position]}
            for position, student in enumerate(gathered.students)
        }
        if not gathered.outsiders:
            return Targets(each=each)
        probabilities, divergence = ensembles.pooled_probabilities(logits, self._temperature)
        return Targets(each=each, shared={"probabilities": probabilities, "divergence": divergence})


def create(distillation: Distillation) -> ServerHalf | None:
    """Returns the server half of an experiment's method; None if it exchanges nothing."""
    match distillation:
        case Independent():
            return None
        case Dml():
            return _Dml(distillation.temperature)
        case Kdcl(ensemble="general"):
            return _KdclGeneral()
        case Kdcl(ensemble="naive"):
            return _Kdcl(ensembles.naive, heavy=False)
        case Kdcl(ensemble="min_logit"):
            return _Kdcl(ensembles.min_logit, heavy=False)
        case Kdcl():
            return _Kdcl(ensembles.linear, heavy=True)
