"""Students whose hidden layers, embeddings or classifiers on hidden layers learn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from codistill.config.methods import Dcm, Rkd, RkdAngle, RkdDistance, Vid
from codistill.methods.objective import Arrays, Loss, Step, StudentContext
from codistill_worker.errors import ConfigurationError
from codistill_worker.methods import losses
from codistill_worker.methods.features import FeatureExtractor, stage_layers

__all__ = ["DcmObjective", "RelationalObjective", "VidObjective", "relational_teacher", "vid_teacher"]


class _Publishing(nn.Module):
    """Of a network's outputs, those that begin with a word."""

    def __init__(self, network: nn.Module, word: str) -> None:
        super().__init__()
        self.network = network
        self._word = word

    def forward(self, images: torch.Tensor) -> Arrays:
        """Returns them, by name."""
        return {name: value for name, value in self.network(images).items() if name.startswith(self._word)}


class VidObjective:
    """CE + λ·Σ_k mean[½·((μ_k − t_k)²/σ_k² + log σ_k²)], VID (Ahn et al. 2019), of the chosen layers k."""

    publishes: tuple[str, ...] = ()
    measures_held_out = False

    def __init__(self, settings: Vid, subject: StudentContext) -> None:
        network = FeatureExtractor(
            subject.model, **subject.shape, features=_layers(settings, subject), seed=subject.seed
        )
        theirs = subject.teacher_shapes()
        self._names = [f"features/{number}" for number in range(1, settings.stages + 1)]
        self._terms = [losses.VariationalInformation(network.shapes[name][0], theirs[name][0]) for name in self._names]
        self._weight = settings.weight
        self.network: nn.Module = network
        self.extra: nn.Module = nn.ModuleList(self._terms)

    def loss(self, step: Step) -> Loss:
        """Returns the loss of one step; the targets are `features/1` …, [B, channels, height, width]."""
        cross_entropy = losses.cross_entropy(step.outputs["logits"], step.labels)
        parts = [
            term(step.outputs[name], target=step.targets[name])
            for term, name in zip(self._terms, self._names, strict=True)
        ]
        term = self._weight * torch.stack(parts).sum()
        return Loss(cross_entropy + term, cross_entropy.detach(), term.detach())


class RelationalObjective:
    """CE + λ_d·D + λ_a·A, RKD (Park et al. 2019): the embeddings' distances and angles are to be the teacher's."""

    publishes: tuple[str, ...] = ()
    measures_held_out = False

    def __init__(self, settings: Rkd | RkdAngle | RkdDistance, subject: StudentContext) -> None:
        self.network: nn.Module = _embedding(subject)
        self.extra = nn.Module()
        self._distance = 0.0 if isinstance(settings, RkdAngle) else settings.distance_weight
        self._angle = 0.0 if isinstance(settings, RkdDistance) else settings.angle_weight

    def loss(self, step: Step) -> Loss:
        """Returns the loss of one step; the target is `embedding`, [B, D]."""
        cross_entropy = losses.cross_entropy(step.outputs["logits"], step.labels)
        embedding, target = step.outputs["embedding"], step.targets["embedding"]
        term = torch.zeros((), device=embedding.device)
        if self._distance:
            term = term + self._distance * losses.relational_distance(embedding, target=target)
        if self._angle:
            term = term + self._angle * losses.relational_angle(embedding, target=target)
        return Loss(cross_entropy + term, cross_entropy.detach(), term.detach())


class DcmObjective:
    """CE + α·Σ CE of the auxiliary classifiers + β·same stage + γ·other stages, DCM (Yao & Sun 2020)."""

    measures_held_out = False

    def __init__(self, settings: Dcm, subject: StudentContext) -> None:
        network = FeatureExtractor(subject.model, **subject.shape, heads=_layers(settings, subject), seed=subject.seed)
        self.network: nn.Module = network
        self.extra: nn.Module = network.heads
        self.publishes: tuple[str, ...] = (
            *(f"logits/stage{number}" for number in range(1, settings.stages + 1)),
            "logits",
        )
        self._settings = settings

    def loss(self, step: Step) -> Loss:
        """Returns the loss of one step; the targets are `same` and `other`, [B, S, C], the final classifier last."""
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


def vid_teacher(settings: Vid, subject: StudentContext) -> nn.Module:
    """Returns what gives a teacher's chosen layers, as maps of at most 8×8."""
    return _Publishing(
        FeatureExtractor(subject.model, **subject.shape, features=_layers(settings, subject)), "features/"
    )


def relational_teacher(settings: Rkd | RkdAngle | RkdDistance, subject: StudentContext) -> nn.Module:
    """Returns what gives a teacher's embedding."""
    del settings
    return _Publishing(_embedding(subject), "embedding")


def _embedding(subject: StudentContext) -> FeatureExtractor:
    try:
        return FeatureExtractor(subject.model, **subject.shape, embedding=True)
    except ConfigurationError as error:
        raise ConfigurationError(f"{subject.name!r} has no embedding to compare: {error}") from error


def _layers(settings: Vid | Dcm, subject: StudentContext) -> Sequence[str]:
    """Returns the layers of a student or teacher, named or found."""
    named = settings.layers.get(subject.name)
    try:
        if named is None:
            shape = subject.shape
            return stage_layers(subject.model, settings.stages, channels=shape["channels"], size=shape["size"])
        FeatureExtractor(subject.model, **subject.shape, features=named)
    except ConfigurationError as error:
        raise ConfigurationError(f"distillation.layers.{subject.name}: {error}") from error
    return named
