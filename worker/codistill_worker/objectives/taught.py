"""Students that learn from a teacher's logits."""

from __future__ import annotations

from codistill.distillation import Kd, LogitRegression
from codistill_worker import losses
from codistill_worker.objectives.alone import LogitsHalf
from codistill_worker.objectives.mechanism import Loss, Step, Subject

__all__ = ["KdHalf", "LogitRegressionHalf"]


class KdHalf(LogitsHalf):
    """(1−λ)·CE + λ·T²·KL(softmax(t/T) ‖ softmax(z/T)), Hinton et al. 2015."""

    def __init__(self, settings: Kd, subject: Subject) -> None:
        super().__init__(subject)
        self._weight = settings.weight
        self._temperature = settings.temperature

    def loss(self, step: Step) -> Loss:
        """Returns the loss of one step; the target is `logits`, [B, C]."""
        logits = step.outputs["logits"]
        cross_entropy = losses.cross_entropy(logits, step.labels)
        term = self._weight * losses.distillation(logits, target=step.targets["logits"], temperature=self._temperature)
        return Loss((1 - self._weight) * cross_entropy + term, cross_entropy.detach(), term.detach())


class LogitRegressionHalf(LogitsHalf):
    """λ·mean (z − t)² over rows and classes, Ba & Caruana 2014, and μ·CE where the experiment asks for it."""

    def __init__(self, settings: LogitRegression, subject: Subject) -> None:
        super().__init__(subject)
        self._weight = settings.weight
        self._label_weight = settings.label_weight

    def loss(self, step: Step) -> Loss:
        """Returns the loss of one step; the target is `logits`, [B, C]."""
        logits = step.outputs["logits"]
        cross_entropy = losses.cross_entropy(logits, step.labels)
        term = self._weight * losses.logit_regression(logits, target=step.targets["logits"])
        return Loss(self._label_weight * cross_entropy + term, cross_entropy.detach(), term.detach())
