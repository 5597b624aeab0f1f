"""Variational information distillation (Ahn et al. 2019): hidden layers predict the teacher's."""

from __future__ import annotations

import torch
from torch import nn

from codistill.config.methods import Vid
from codistill.methods import Loss, Objective, Step, StudentContext
from codistill_worker.methods import losses
from codistill_worker.methods.features import FeatureExtractor, SelectedOutputs, chosen_layers

__all__ = ["objective", "teacher"]


def objective(settings: Vid, context: StudentContext) -> Objective:
    """Return CE + λ·Σ_k mean[½·((μ_k − t_k)²/σ_k² + log σ_k²)] over the chosen layers k."""
    return _VidObjective(settings, context)


def teacher(settings: Vid, context: StudentContext) -> nn.Module:
    """Return the network that gives the teacher's chosen layers, as maps of at most 8×8."""
    layers = chosen_layers(context, settings.layers, settings.stages)
    return SelectedOutputs(FeatureExtractor(context.model, **context.shape, features=layers), "features/")


class _VidObjective:
    publishes: tuple[str, ...] = ()
    measures_held_out = False

    def __init__(self, settings: Vid, context: StudentContext) -> None:
        layers = chosen_layers(context, settings.layers, settings.stages)
        network = FeatureExtractor(context.model, **context.shape, features=layers, seed=context.seed)
        teacher_shapes = context.teacher_shapes()
        self._names = [f"features/{stage}" for stage in range(1, settings.stages + 1)]
        self._terms = [
            losses.VariationalInformation(network.shapes[name][0], teacher_shapes[name][0]) for name in self._names
        ]
        self._weight = settings.weight
        self.network: nn.Module = network
        self.extra: nn.Module = nn.ModuleList(self._terms)

    def loss(self, step: Step) -> Loss:
        """Return the loss of one step; the targets are `features/1` …, [B, channels, height, width]."""
        cross_entropy = losses.cross_entropy(step.outputs["logits"], step.labels)
        layer_losses = [
            term(step.outputs[name], target=step.targets[name])
            for term, name in zip(self._terms, self._names, strict=True)
        ]
        term = self._weight * torch.stack(layer_losses).sum()
        return Loss(cross_entropy + term, cross_entropy.detach(), term.detach())
