"""Relational distillation of distances (Park et al. 2019) between embeddings."""

from __future__ import annotations

from torch import nn

from codistill.config.methods import RkdDistance
from codistill.methods import Objective, StudentContext
from codistill_worker.methods.relational import RelationalObjective, embedding_network

__all__ = ["objective", "teacher"]


def objective(settings: RkdDistance, context: StudentContext) -> Objective:
    """Return CE + λ_d·D."""
    return RelationalObjective(context, distance_weight=settings.distance_weight)


def teacher(settings: RkdDistance, context: StudentContext) -> nn.Module:  # noqa: ARG001
    """Return the network that gives the teacher's `embedding`, [B, D]."""
    return embedding_network(context)
