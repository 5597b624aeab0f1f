"""Students that learn from the labels, and what is common to all that need no output but logits."""

from __future__ import annotations

from codistill.config.methods import Independent
from codistill.methods.objective import LogitsObjective, Loss, Step, StudentContext
from codistill_worker.methods import losses

__all__ = ["IndependentObjective"]


class IndependentObjective(LogitsObjective):
    """Cross-entropy against the labels, smoothed: y' = (1−ε)·onehot + ε/C."""

    def __init__(self, settings: Independent, subject: StudentContext) -> None:
        super().__init__(subject)
        self._smoothing = settings.label_smoothing

    def loss(self, step: Step) -> Loss:
        """Returns the loss of one step."""
        logits, labels = step.outputs["logits"], step.labels
        total = losses.cross_entropy(logits, labels, self._smoothing)
        plain = losses.cross_entropy(logits.detach(), labels) if self._smoothing else total.detach()
        return Loss(total, plain)
