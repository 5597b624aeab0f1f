"""The outputs that a participant publishes, and their shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from codistill.config.experiment import Experiment
from codistill.methods import ImageShape, StudentContext
from codistill.process.randomness import seeded
from codistill_worker import methods, models
from codistill_worker.data import Dataset

__all__ = ["Outputs", "Published", "image_shape", "output_shapes", "teacher_shapes"]


@dataclass(frozen=True)
class Outputs:
    """Published outputs of some samples, on the CPU.

    Attributes:
        ids: the samples' positions in the training set, [B], int64.
        labels: their classes, [B], int64.
        arrays: the named outputs, each [B, ...], float32; empty for a student that only learns.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    arrays: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Published:
    """The outputs that a participant publishes in a step: of its batch, and in some steps of the held-out samples."""

    step: int
    batch: Outputs
    held_out: Outputs | None = None


def image_shape(dataset: Dataset) -> ImageShape:
    """Return classes, channels and image size of a data set, from which models are built."""
    return {"classes": dataset.classes, "channels": dataset.channels, "size": dataset.height}


def output_shapes(network: nn.Module, shape: ImageShape, device: torch.device) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a network's named outputs, without the samples, by running it on two empty images.

    The global generators are seeded meanwhile, and then as they were: a model may keep what it draws.
    """
    images = torch.zeros(2, shape["channels"], shape["size"], shape["size"], device=device)
    network.eval()
    with torch.no_grad(), seeded(0):
        shapes = {name: tuple(value.shape[1:]) for name, value in network(images).items()}
    network.train()
    return shapes


def teacher_shapes(experiment: Experiment, shape: ImageShape) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of the first teacher's outputs, without the samples.

    This builds the teacher's model, without its weights.
    """
    plan = experiment.teacher_plan(experiment.teacher_names[0])
    model = models.build(plan.teacher.model, **shape, args=plan.teacher.model_args, seed=0)
    context = StudentContext(plan.teacher.name, model, shape, dict)
    return output_shapes(methods.teacher_network(plan.distillation, context), shape, torch.device("cpu"))
