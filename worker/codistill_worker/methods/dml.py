"""Deep mutual learning (Zhang et al. 2018): every student mimics the others' probabilities."""

from __future__ import annotations

from codistill.config.methods import Dml
from codistill.methods import LogitsObjective, Loss, Objective, Step, StudentContext
from codistill_worker.methods import losses

__all__ = ["objective"]


def objective(settings: Dml, context: StudentContext) -> Objective:
    """Return CE_k + λ·T²·1/(K−1)·Σ_{l≠k} KL(p_l ‖ p_k), eq. 7 of the paper."""
    return _DmlObjective(settings, context)


class _DmlObjective(LogitsObjective):
    """Mimics the mean of the others' probabilities.

    The server sends that mean, m, and for each sample the constant by which KL(m ‖ p_k) falls short of the pairwise mean.
    So gradient and value are those of the pairwise mean. A wire of half precision rounds every entry of m by itself;
    dividing by their sum makes m a distribution again.
    """

    publishes: tuple[str, ...] = ("logits",)

    def __init__(self, settings: Dml, context: StudentContext) -> None:
        super().__init__(context)
        self._weight = settings.weight
        self._temperature = settings.temperature

    def loss(self, step: Step) -> Loss:
        """Return the loss of one step; the targets are `probabilities`, [B, C], and `divergence`, [B]."""
        logits, temperature = step.outputs["logits"], self._temperature
        cross_entropy = losses.cross_entropy(logits, step.labels)
        term = self._weight * losses.mimicry(logits, target=step.targets["probabilities"], temperature=temperature)
        constant = self._weight * temperature**2 * step.targets["divergence"].detach().float().mean()
        return Loss(cross_entropy + term, cross_entropy.detach(), term.detach() + constant)
