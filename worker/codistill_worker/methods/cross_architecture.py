"""Cross-architecture distillation, after Gao et al. (2019): now and then the students learn from their mean."""

from __future__ import annotations

from codistill.config.methods import CrossArchitecture
from codistill.methods import LogitsObjective, Loss, Objective, Step, StudentContext
from codistill_worker.methods import losses

__all__ = ["objective"]


def objective(settings: CrossArchitecture, context: StudentContext) -> Objective:
    """Return CE + w(e)·T²·KL(m ‖ softmax(z/T)), for the rounds that exchange."""
    return _CrossArchitectureObjective(settings, context)


class _CrossArchitectureObjective(LogitsObjective):
    """Mimics m, the mean of all students' probabilities, its own among them, with a weight w that rises."""

    publishes: tuple[str, ...] = ("logits",)

    def __init__(self, settings: CrossArchitecture, context: StudentContext) -> None:
        super().__init__(context)
        self._settings = settings

    def loss(self, step: Step) -> Loss:
        """Return the loss of one step; the target is `probabilities`, [B, C]."""
        settings, logits = self._settings, step.outputs["logits"]
        weight = losses.rising_weight(
            step.epoch,
            start=settings.start_epoch,
            end=step.epochs if settings.full_epoch is None else settings.full_epoch,
            highest=settings.weight,
            rise=settings.rise,
        )
        cross_entropy = losses.cross_entropy(logits, step.labels)
        term = weight * losses.mimicry(logits, target=step.targets["probabilities"], temperature=settings.temperature)
        return Loss(cross_entropy + term, cross_entropy.detach(), term.detach())
