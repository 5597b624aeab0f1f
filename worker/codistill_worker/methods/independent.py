"""Students that learn from the labels, and what is common to all that need no output but logits."""

from __future__ import annotations

from torch import nn

from codistill.config.methods import Independent
from codistill_worker.methods import losses
from codistill_worker.methods.base import Logits, Loss, Step, StudentContext

__all__ = ["IndependentObjective", "LogitsObjective"]


class LogitsObjective:
    """What a half is that needs the model's logits and trains nothing else; it lacks the loss."""

    publishes: tuple[str, ...] = ()
    measures_held_out = False

    def __init__(self, subject: StudentContext) -> None:
        self.network: nn.Module = Logits(subject.model)
        self.extra = nn.Module()


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
