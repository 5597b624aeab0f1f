"""The loss of the labels and of softened target logits, which several methods share."""

from __future__ import annotations

from codistill.methods import LogitsObjective, Loss, Step, StudentContext
from codistill_worker.methods import losses

__all__ = ["SoftTargetObjective"]


class SoftTargetObjective(LogitsObjective):
    """μ·CE + λ·T²·KL(softmax(t/T) ‖ softmax(z/T)).

    Args:
        context: the student.
        weight: λ.
        temperature: T.
        label_weight: μ.
    """

    def __init__(
        self, context: StudentContext, *, weight: float, temperature: float, label_weight: float = 1.0
    ) -> None:
        super().__init__(context)
        self._weight = weight
        self._temperature = temperature
        self._label_weight = label_weight

    def loss(self, step: Step) -> Loss:
        """Return the loss of one step; the target is `logits`, [B, C]."""
        logits = step.outputs["logits"]
        cross_entropy = losses.cross_entropy(logits, step.labels)
        term = self._weight * losses.distillation(logits, target=step.targets["logits"], temperature=self._temperature)
        return Loss(self._label_weight * cross_entropy + term, cross_entropy.detach(), term.detach())
