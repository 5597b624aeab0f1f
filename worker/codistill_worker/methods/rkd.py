"""Relational distillation of distances and angles (Park et al. 2019) between embeddings."""

from __future__ import annotations

from torch import nn

from codistill.config.methods import Rkd
from codistill.methods import Objective, StudentContext
from codistill_worker.methods.relational import RelationalObjective, embedding_network

__all__ = ["objective", "teacher"]


def objective(settings: Rkd, context: StudentContext) -> Objective:
    """Return CE + λ_d·D + λ_a·A."""
    return RelationalObjective(context, distance_weight=settings.distance_weight, angle_weight=settings.angle_weight)


def teacher(settings: Rkd, context: StudentContext) -> nn.Module:  # noqa: ARG001
    """Return the network that gives the teacher's `embedding`, [B, D]."""
    return embedding_network(context)
