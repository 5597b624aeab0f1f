"""Every student alone, on the labels."""

from __future__ import annotations

from codistill.config.methods import Independent
from codistill.methods import LogitsObjective, Loss, Objective, Step, StudentContext
from codistill_worker.methods import losses

__all__ = ["objective"]


def objective(settings: Independent, context: StudentContext) -> Objective:
    """Return cross-entropy against the labels, smoothed: y' = (1−ε)·onehot + ε/C."""
    return _IndependentObjective(context, settings.label_smoothing)


class _IndependentObjective(LogitsObjective):
    def __init__(self, context: StudentContext, label_smoothing: float) -> None:
        super().__init__(context)
        self._label_smoothing = label_smoothing

    def loss(self, step: Step) -> Loss:
        """Return the loss of one step; the reported cross-entropy has no smoothing."""
        logits, labels = step.outputs["logits"], step.labels
        total = losses.cross_entropy(logits, labels, self._label_smoothing)
        plain = losses.cross_entropy(logits.detach(), labels) if self._label_smoothing else total.detach()
        return Loss(total, plain)
