"""Logit regression (Ba & Caruana 2014): least squares between the student's logits and the teacher's."""

from __future__ import annotations

from codistill.config.methods import LogitRegression
from codistill.methods import LogitsObjective, Loss, Objective, Step, StudentContext
from codistill_worker.methods import losses

__all__ = ["objective"]


def objective(settings: LogitRegression, context: StudentContext) -> Objective:
    """Return λ·mean (z − t)² over rows and classes, and μ·CE where the experiment asks for it."""
    return _LogitRegressionObjective(settings, context)


class _LogitRegressionObjective(LogitsObjective):
    def __init__(self, settings: LogitRegression, context: StudentContext) -> None:
        super().__init__(context)
        self._weight = settings.weight
        self._label_weight = settings.label_weight

    def loss(self, step: Step) -> Loss:
        """Return the loss of one step; the target is `logits`, [B, C]."""
        logits = step.outputs["logits"]
        cross_entropy = losses.cross_entropy(logits, step.labels)
        term = self._weight * losses.logit_regression(logits, target=step.targets["logits"])
        return Loss(self._label_weight * cross_entropy + term, cross_entropy.detach(), term.detach())
