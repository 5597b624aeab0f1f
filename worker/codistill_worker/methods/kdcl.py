"""Students that teach one another: KDCL, deep mutual learning, and cross-architecture distillation."""

from __future__ import annotations

from codistill.config.methods import CrossArchitecture, Dml, Kdcl
from codistill.methods.objective import LogitsObjective, Loss, Step, StudentContext
from codistill_worker.methods import losses

__all__ = ["CrossArchitectureObjective", "DmlObjective", "KdclObjective"]


class KdclObjective(LogitsObjective):
    """CE + λ·T²·KL(softmax(target/T) ‖ softmax(z/T)), KDCL (Guo et al. 2020), the loss of every student."""

    publishes: tuple[str, ...] = ("logits",)

    def __init__(self, settings: Kdcl, subject: StudentContext) -> None:
        super().__init__(subject)
        self.measures_held_out = settings.ensemble == "general"
        self._weight = settings.weight
        self._temperature = settings.temperature

    def loss(self, step: Step) -> Loss:
        """Returns the loss of one step; the target is `logits`, [B, C]."""
        logits = step.outputs["logits"]
        cross_entropy = losses.cross_entropy(logits, step.labels)
        term = self._weight * losses.distillation(logits, target=step.targets["logits"], temperature=self._temperature)
        return Loss(cross_entropy + term, cross_entropy.detach(), term.detach())


class DmlObjective(LogitsObjective):
    """CE_k + λ·T²·1/(K−1)·Σ_{l≠k} KL(p_l ‖ p_k), DML (Zhang et al. 2018, eq. 7).

    The server sends m, the mean of the others' probabilities, and per sample the constant by which KL(m ‖ p_k) falls
    short of the pairwise mean: the gradient is the same, and so is the value. On a wire of half precision every entry
    of m is rounded by itself; dividing by their sum makes m a distribution again.
    """

    publishes: tuple[str, ...] = ("logits",)

    def __init__(self, settings: Dml, subject: StudentContext) -> None:
        super().__init__(subject)
        self._weight = settings.weight
        self._temperature = settings.temperature

    def loss(self, step: Step) -> Loss:
        """Returns the loss of one step; the targets are `probabilities`, [B, C], and `divergence`, [B]."""
        logits, temperature = step.outputs["logits"], self._temperature
        cross_entropy = losses.cross_entropy(logits, step.labels)
        term = self._weight * losses.mimicry(logits, target=step.targets["probabilities"], temperature=temperature)
        constant = self._weight * temperature**2 * step.targets["divergence"].detach().float().mean()
        return Loss(cross_entropy + term, cross_entropy.detach(), term.detach() + constant)


class CrossArchitectureObjective(LogitsObjective):
    """CE + w(e)·T²·KL(m ‖ softmax(z/T)) in the rounds that exchange, after Gao et al. (2019).

    m is the mean of all students' probabilities, this one's among them; w rises during training.
    """

    publishes: tuple[str, ...] = ("logits",)

    def __init__(self, settings: CrossArchitecture, subject: StudentContext) -> None:
        super().__init__(subject)
        self._settings = settings

    def loss(self, step: Step) -> Loss:
        """Returns the loss of one step; the target is `probabilities`, [B, C]."""
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
