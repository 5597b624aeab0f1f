"""Dense cross-layer mutual distillation (Yao & Sun 2020): classifiers on hidden layers teach one another too."""

from __future__ import annotations

from torch import nn

from codistill.config.methods import Dcm
from codistill.methods import Loss, Objective, Step, StudentContext
from codistill_worker.methods import losses
from codistill_worker.methods.features import FeatureExtractor, chosen_layers

__all__ = ["objective"]


def objective(settings: Dcm, context: StudentContext) -> Objective:
    """Return CE + α·Σ CE of the auxiliary classifiers + β·same stage + γ·other stages."""
    return _DcmObjective(settings, context)


class _DcmObjective:
    measures_held_out = False

    def __init__(self, settings: Dcm, context: StudentContext) -> None:
        layers = chosen_layers(context, settings.layers, settings.stages)
        network = FeatureExtractor(context.model, **context.shape, heads=layers, seed=context.seed)
        self.network: nn.Module = network
        self.extra: nn.Module = network.heads
        self.publishes: tuple[str, ...] = (
            *(f"logits/stage{stage}" for stage in range(1, settings.stages + 1)),
            "logits",
        )
        self._settings = settings

    def loss(self, step: Step) -> Loss:
        """Return the loss of one step; the targets are `same` and `other`, [B, S, C], the final classifier last."""
        settings = self._settings
        total = losses.dense_cross_layer(
            [step.outputs[name] for name in self.publishes],
            step.labels,
            same_stage=step.targets["same"].transpose(0, 1),
            other_stages=step.targets["other"].transpose(0, 1),
            auxiliary_weight=settings.auxiliary_weight,
            same_weight=settings.same_weight,
            other_weight=settings.other_weight,
        )
        cross_entropy = losses.cross_entropy(step.outputs["logits"].detach(), step.labels)
        return Loss(total, cross_entropy, total.detach() - cross_entropy)
