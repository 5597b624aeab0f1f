"""Relational distillation (Park et al. 2019): the relations among a batch's embeddings follow the teacher's."""

from __future__ import annotations

import torch
from torch import nn

from codistill.methods import Loss, Step, StudentContext
from codistill_worker.errors import ConfigurationError
from codistill_worker.methods import losses
from codistill_worker.methods.features import FeatureExtractor, SelectedOutputs

__all__ = ["RelationalObjective", "embedding_network"]


class RelationalObjective:
    """CE + λ_d·D + λ_a·A: the embeddings' distances and angles are to be the teacher's.

    Args:
        context: the student.
        distance_weight: λ_d; 0 leaves the term out.
        angle_weight: λ_a; 0 leaves the term out.
    """

    publishes: tuple[str, ...] = ()
    measures_held_out = False

    def __init__(self, context: StudentContext, *, distance_weight: float = 0.0, angle_weight: float = 0.0) -> None:
        self.network: nn.Module = _with_embedding(context)
        self.extra = nn.Module()
        self._distance_weight = distance_weight
        self._angle_weight = angle_weight

    def loss(self, step: Step) -> Loss:
        """Return the loss of one step; the target is `embedding`, [B, D]."""
        cross_entropy = losses.cross_entropy(step.outputs["logits"], step.labels)
        embedding, target = step.outputs["embedding"], step.targets["embedding"]
        term = torch.zeros((), device=embedding.device)
        if self._distance_weight:
            term = term + self._distance_weight * losses.relational_distance(embedding, target=target)
        if self._angle_weight:
            term = term + self._angle_weight * losses.relational_angle(embedding, target=target)
        return Loss(cross_entropy + term, cross_entropy.detach(), term.detach())


def embedding_network(context: StudentContext) -> nn.Module:
    """Return the network that gives a teacher's `embedding`, [B, D].

    Raises:
        ConfigurationError: the model has no embedding.
    """
    return SelectedOutputs(_with_embedding(context), "embedding")


def _with_embedding(context: StudentContext) -> FeatureExtractor:
    try:
        return FeatureExtractor(context.model, **context.shape, embedding=True)
    except ConfigurationError as error:
        raise ConfigurationError(f"{context.name!r} has no embedding to compare: {error}") from error
