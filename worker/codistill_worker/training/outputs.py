"""The outputs that a participant publishes, and their shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from codistill.config.experiment import Experiment
from codistill.methods import ImageShape, StudentContext
from codistill.process.plugins import code_place
from codistill.process.randomness import seeded
from codistill_worker import methods, models
from codistill_worker.data import Dataset

__all__ = [
    "OutputError",
    "Outputs",
    "Published",
    "check_output",
    "check_outputs",
    "image_shape",
    "output_shapes",
    "teacher_shapes",
]


class OutputError(TypeError):
    """A network's outputs have another type or shape than the method needs; the text is half a sentence."""


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


def check_output(name: str, value: Any, wanted: tuple[int, ...], model: nn.Module, *, trains: bool = False) -> None:
    """Check an output's type and shape, and its gradient where it is trained on.

    Args:
        name: of the output.
        value: what the network gave.
        wanted: the shape [B, ...].
        model: the participant's, for the place in the message.
        trains: whether the output needs a gradient.

    Raises:
        OutputError: it is another, or has no gradient.
    """
    if isinstance(value, torch.Tensor):
        if value.shape == wanted and value.is_floating_point():
            if value.requires_grad or not trains:
                return
            raise OutputError(
                f"it gives {name} without a gradient while it trains{_place(model)}, so nothing can be trained: remove detach, "
                "torch.no_grad or torch.set_grad_enabled(False) from its code"
            )
        given = f"{value.dtype} {list(value.shape)}"
    else:
        given = f"a {type(value).__name__}"
    raise OutputError(
        f"it gives {given} as {name} for {wanted[0]} images{_place(model)}; expected a floating-point tensor {list(wanted)}"
        f"{': let it return its logits only' if name == 'logits' else ''}"
    )


def _place(model: nn.Module) -> str:
    place = code_place(type(model).forward)
    return f" ({place})" if place else ""


def check_outputs(outputs: Any, shapes: Mapping[str, tuple[int, ...]], samples: int, model: nn.Module) -> None:
    """Check the outputs of a network that have shapes, [...] without the samples.

    Raises:
        OutputError: one is missing, or has another type or shape.
    """
    if not isinstance(outputs, Mapping):
        raise OutputError(f"its network gives a {type(outputs).__name__}; expected outputs by name")
    for name, shape in shapes.items():
        check_output(name, outputs.get(name), (samples, *shape), model)


def teacher_shapes(experiment: Experiment, shape: ImageShape) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of the first teacher's outputs, without the samples.

    This builds the teacher's model, without its weights.
    """
    plan = experiment.teacher_plan(experiment.teacher_names[0])
    model = models.build(plan.teacher.model, **shape, args=plan.teacher.model_args, seed=0)
    context = StudentContext(plan.teacher.name, model, shape, dict)
    return output_shapes(methods.teacher_network(plan.distillation, context), shape, torch.device("cpu"))
