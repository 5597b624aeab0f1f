"""Students that learn from a teacher's logits, and two of them from each other too."""

from __future__ import annotations

from codistill.config.methods import BornAgain, Fddml, Hddml, Kd, LogitRegression
from codistill.methods.objective import LogitsObjective, Loss, Step, StudentContext
from codistill_worker.methods import losses

__all__ = ["BornAgainObjective", "KdObjective", "LogitRegressionObjective", "TaughtMutualObjective"]


class _SoftenedObjective(LogitsObjective):
    """μ·CE + λ·T²·KL(softmax(t/T) ‖ softmax(z/T)): the labels, and the teacher's softened logits."""

    def __init__(self, settings: Kd | BornAgain, subject: StudentContext, label_weight: float) -> None:
        super().__init__(subject)
        self._label_weight = label_weight
        self._weight = settings.weight
        self._temperature = settings.temperature

    def loss(self, step: Step) -> Loss:
        """Returns the loss of one step; the target is `logits`, [B, C]."""
        logits = step.outputs["logits"]
        cross_entropy = losses.cross_entropy(logits, step.labels)
        term = self._weight * losses.distillation(logits, target=step.targets["logits"], temperature=self._temperature)
        return Loss(self._label_weight * cross_entropy + term, cross_entropy.detach(), term.detach())


class KdObjective(_SoftenedObjective):
    """(1−λ)·CE + λ·T²·KL(softmax(t/T) ‖ softmax(z/T)), Hinton et al. 2015."""

    def __init__(self, settings: Kd, subject: StudentContext) -> None:
        super().__init__(settings, subject, label_weight=1 - settings.weight)


class BornAgainObjective(_SoftenedObjective):
    """CE + λ·T²·KL(softmax(t/T) ‖ softmax(z/T)) with T = 1 and λ = 1, Furlanello et al. 2018."""

    def __init__(self, settings: BornAgain, subject: StudentContext) -> None:
        super().__init__(settings, subject, label_weight=1)


class LogitRegressionObjective(LogitsObjective):
    """λ·mean (z − t)² over rows and classes, Ba & Caruana 2014, and μ·CE where the experiment asks for it."""

    def __init__(self, settings: LogitRegression, subject: StudentContext) -> None:
        super().__init__(subject)
        self._weight = settings.weight
        self._label_weight = settings.label_weight

    def loss(self, step: Step) -> Loss:
        """Returns the loss of one step; the target is `logits`, [B, C]."""
        logits = step.outputs["logits"]
        cross_entropy = losses.cross_entropy(logits, step.labels)
        term = self._weight * losses.logit_regression(logits, target=step.targets["logits"])
        return Loss(self._label_weight * cross_entropy + term, cross_entropy.detach(), term.detach())


class TaughtMutualObjective(LogitsObjective):
    """CE + λ·T²·KL(softmax(t/T) ‖ softmax(z/T)) + β·KL(p ‖ softmax(z)), FDDML and HDDML (Lukman & Yang 2022).

    p is the other student's, t the teacher's, which the server sends to those that it is to teach. Printed forms have
    KL(p_2 ‖ p_1) in the loss of both students; here each mimics its peer.
    """

    publishes: tuple[str, ...] = ("logits",)

    def __init__(self, settings: Fddml | Hddml, subject: StudentContext) -> None:
        super().__init__(subject)
        self._settings = settings

    def loss(self, step: Step) -> Loss:
        """Returns the loss of one step; the targets are `probabilities` and perhaps `logits`, [B, C]."""
        logits, settings = step.outputs["logits"], self._settings
        total = losses.taught_mutual(
            logits,
            step.labels,
            teacher=step.targets.get("logits"),
            peer=step.targets["probabilities"],
            teacher_weight=settings.weight,
            peer_weight=settings.peer_weight,
            temperature=settings.temperature,
        )
        cross_entropy = losses.cross_entropy(logits.detach(), step.labels)
        return Loss(total, cross_entropy, total.detach() - cross_entropy)
