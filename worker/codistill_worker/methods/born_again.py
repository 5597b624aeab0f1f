"""Born-again networks (Furlanello et al. 2018): a student learns from its own previous generation."""

from __future__ import annotations

from codistill.config.methods import BornAgain
from codistill.methods import Objective, StudentContext
from codistill_worker.methods.soft_targets import SoftTargetObjective

__all__ = ["objective"]


def objective(settings: BornAgain, context: StudentContext) -> Objective:
    """Return CE + λ·T²·KL(softmax(t/T) ‖ softmax(z/T)); the paper has T = 1 and λ = 1."""
    return SoftTargetObjective(context, weight=settings.weight, temperature=settings.temperature)
