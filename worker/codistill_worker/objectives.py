"""The worker halves of the methods: each turns a student's outputs and its targets into a loss.

Targets are constants: they come over the wire and no gradient flows into them. Cross-entropies and divergences are
summed over classes and averaged over the batch's rows, in float32, with log-softmax, so they are finite wherever the
logits are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from codistill.experiment import Distillation, Dml, Independent, Kdcl

__all__ = ["Loss", "WorkerHalf", "create", "divergence", "labels_alone"]

Arrays = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Loss:
    """A step's loss.

    Attributes:
        total: what is minimised, a scalar with a gradient.
        cross_entropy: against the labels, without smoothing, a scalar without a gradient.
        distillation: the method's term with its weight, a scalar without a gradient; None where there is none.
    """

    total: torch.Tensor
    cross_entropy: torch.Tensor
    distillation: torch.Tensor | None = None


class WorkerHalf(Protocol):
    """The worker half of a method.

    Attributes:
        exchanges: whether the student publishes its logits each round and gets targets for them.
        measures_held_out: whether it also publishes its logits for the held-out samples, once an epoch.
    """

    exchanges: bool
    measures_held_out: bool

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, targets: Arrays) -> Loss:
        """Returns the loss of one step.

        Args:
            logits: the student's, [B, C], float32, with a gradient.
            labels: the samples' classes, [B], int64.
            targets: the method's named arrays, on the logits' device; empty where nothing is exchanged.
        """
        ...


def labels_alone() -> WorkerHalf:
    """Returns the loss of a round that closed below the quorum, without targets: cross-entropy with the labels."""
    return _Independent(Independent())


def divergence(target: torch.Tensor, log_probabilities: torch.Tensor) -> torch.Tensor:
    """Returns KL(target ‖ student), summed over classes and averaged over rows, in nats.

    Args:
        target: probabilities, [B, C], float32; a class of probability 0 adds 0.
        log_probabilities: the student's, [B, C].
    """
    return functional.kl_div(log_probabilities, target, reduction="batchmean")


class _Independent:
    """Cross-entropy against the labels, smoothed: y' = (1−ε)·onehot + ε/C."""

    exchanges = False
    measures_held_out = False

    def __init__(self, settings: Independent) -> None:
        self._smoothing = settings.label_smoothing

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, targets: Arrays) -> Loss:
        del targets
        total = functional.cross_entropy(logits, labels, label_smoothing=self._smoothing)
        plain = functional.cross_entropy(logits.detach(), labels) if self._smoothing else total.detach()
        return Loss(total, plain)


class _Kdcl:
    """CE + λ·T²·KL(softmax(target/T) ‖ softmax(z/T)), KDCL (Guo et al. 2020), the loss of every student."""

    exchanges = True

    def __init__(self, settings: Kdcl) -> None:
        self.measures_held_out = settings.ensemble == "general"
        self._weight = settings.weight
        self._temperature = settings.temperature

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, targets: Arrays) -> Loss:
        temperature = self._temperature
        cross_entropy = functional.cross_entropy(logits, labels)
        target = torch.softmax(targets["logits"].detach().float() / temperature, -1)
        mimicry = divergence(target, torch.log_softmax(logits / temperature, -1))
        term = self._weight * temperature**2 * mimicry
        return Loss(cross_entropy + term, cross_entropy.detach(), term.detach())


class _Dml:
    """CE_k + λ·T²·1/(K−1)·Σ_{l≠k} KL(p_l ‖ p_k), DML (Zhang et al. 2018, eq. 7).

    The server sends m, the mean of the others' probabilities, and per sample the constant by which KL(m ‖ p_k) falls
    short of the pairwise mean: the gradient is the same, and so is the value. On a wire of half precision every entry
    of m is rounded by itself; dividing by their sum makes m a distribution again.
    """

    exchanges = True
    measures_held_out = False

    def __init__(self, settings: Dml) -> None:
        self._weight = settings.weight
        self._temperature = settings.temperature

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, targets: Arrays) -> Loss:
        temperature = self._temperature
        cross_entropy = functional.cross_entropy(logits, labels)
        probabilities = targets["probabilities"].detach().float()
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        mimicry = divergence(probabilities, torch.log_softmax(logits / temperature, -1))
        scale = self._weight * temperature**2
        term = scale * mimicry
        constant = scale * targets["divergence"].detach().float().mean()
        return Loss(cross_entropy + term, cross_entropy.detach(), term.detach() + constant)


def create(distillation: Distillation) -> WorkerHalf:
    """Returns the worker half of an experiment's method, with one student's overrides applied."""
    match distillation:
        case Independent():
            return _Independent(distillation)
        case Dml():
            return _Dml(distillation)
        case Kdcl():
            return _Kdcl(distillation)
