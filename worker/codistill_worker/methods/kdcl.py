"""KDCL (Guo et al. 2020): every student learns from one ensemble's soft target."""

from __future__ import annotations

from codistill.config.methods import KDCL_ENSEMBLES, Kdcl
from codistill.methods import Objective, StudentContext
from codistill_worker.methods.soft_targets import SoftTargetObjective

__all__ = ["objective"]


def objective(settings: Kdcl, context: StudentContext) -> Objective:
    """Return CE + λ·T²·KL(softmax(target/T) ‖ softmax(z/T)), the loss of every student."""
    made = SoftTargetObjective(context, weight=settings.weight, temperature=settings.temperature)
    made.publishes = ("logits",)
    made.measures_held_out = KDCL_ENSEMBLES[settings.ensemble].held_out
    return made
