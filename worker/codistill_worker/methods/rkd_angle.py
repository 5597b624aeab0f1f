"""Relational distillation of angles (Park et al. 2019) between embeddings."""

from __future__ import annotations

from torch import nn

from codistill.config.methods import RkdAngle
from codistill.methods import Objective, StudentContext
from codistill_worker.methods.relational import RelationalObjective, embedding_network

__all__ = ["objective", "teacher"]


def objective(settings: RkdAngle, context: StudentContext) -> Objective:
    """Return CE + λ_a·A."""
    return RelationalObjective(context, angle_weight=settings.angle_weight)


def teacher(settings: RkdAngle, context: StudentContext) -> nn.Module:  # noqa: ARG001
    """Return the network that gives the teacher's `embedding`, [B, D]."""
    return embedding_network(context)
