"""Knowledge distillation (Hinton et al. 2015) from a teacher's logits."""

from __future__ import annotations

from codistill.config.methods import Kd
from codistill.methods import Objective, StudentContext
from codistill_worker.methods.soft_targets import SoftTargetObjective

__all__ = ["objective"]


def objective(settings: Kd, context: StudentContext) -> Objective:
    """Return (1−λ)·CE + λ·T²·KL(softmax(t/T) ‖ softmax(z/T))."""
    return SoftTargetObjective(
        context, weight=settings.weight, temperature=settings.temperature, label_weight=1 - settings.weight
    )
