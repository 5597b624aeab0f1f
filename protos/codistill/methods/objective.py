"""The worker's interface of a method: an :class:`Objective` has a network with named outputs, and a loss.

Targets are constants: they come over the wire and no gradient flows into them. Cross-entropies and divergences are
summed over classes and averaged over the batch's rows. They are computed in float32 with log-softmax, so they are finite
wherever the logits are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, TypedDict

import torch
from torch import nn
from torch.nn import functional

__all__ = [
    "Arrays",
    "ImageShape",
    "Logits",
    "LogitsObjective",
    "Loss",
    "Objective",
    "Step",
    "StudentContext",
    "label_loss",
]

Arrays: TypeAlias = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Loss:
    """The loss of one step.

    Attributes:
        total: minimised by the student's optimiser, a scalar with a gradient.
        cross_entropy: against the labels, without smoothing, a scalar without a gradient.
        distillation: the method's term with its weight, a scalar without a gradient; None where there is none.
    """

    total: torch.Tensor
    cross_entropy: torch.Tensor
    distillation: torch.Tensor | None = None


def _no_arrays() -> Arrays:
    return {}


@dataclass(frozen=True)
class Step:
    """The inputs of one step's loss.

    Attributes:
        outputs: the network's, each [B, ...], float32, with a gradient; "logits" [B, C] among them.
        labels: the samples' classes, [B], int64.
        targets: the method's named arrays, on the outputs' device; empty where nothing is exchanged.
        epoch: the number of epochs trained so far, with its fraction.
        epochs: the number of epochs in the run.
    """

    outputs: Arrays
    labels: torch.Tensor
    targets: Arrays = field(default_factory=_no_arrays)
    epoch: float = 0.0
    epochs: int = 1


class ImageShape(TypedDict):
    """Classes of a data set, channels of its images, and their size: height and width, in pixels."""

    classes: int
    channels: int
    size: int


@dataclass(frozen=True)
class StudentContext:
    """The student or teacher that an objective is built for.

    Attributes:
        name: of the student or teacher.
        model: its model, on its device: [B, channels, size, size] to [B, C].
        shape: the classes, channels and image size that the model was built for.
        teacher_shapes: returns the shapes of the teacher's outputs, without the samples. It builds the teacher's model,
            so call it only to learn a mapping onto those outputs.
        seed: of the objective's random draws, 63 bits. While an objective is built, the global generators of Python,
            NumPy and torch are seeded with it too.
    """

    name: str
    model: nn.Module
    shape: ImageShape
    teacher_shapes: Callable[[], Mapping[str, tuple[int, ...]]]
    seed: int = 0


class Objective(Protocol):
    """A method's loss for one student, and the network that computes its inputs.

    Attributes:
        network: maps a batch of images to named outputs; contains the student's model, and may hold other modules.
        extra: modules that the student's optimiser trains besides the model. Checkpoints hold them, exports do not.
        publishes: the names of the outputs that the student publishes in a round that exchanges.
        measures_held_out: whether to publish them for the held-out samples too, once an epoch.
    """

    network: nn.Module
    extra: nn.Module
    publishes: tuple[str, ...]
    measures_held_out: bool

    def loss(self, step: Step) -> Loss:
        """Return the loss of one step."""
        ...


class Logits(nn.Module):
    """A model whose only output is its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> Arrays:
        """Return `logits`, [B, C]."""
        return {"logits": self.model(images)}


class LogitsObjective:
    """Base of objectives that need the model's logits and train nothing else; subclasses define `loss`."""

    publishes: tuple[str, ...] = ()
    measures_held_out = False

    def __init__(self, context: StudentContext) -> None:
        self.network: nn.Module = Logits(context.model)
        self.extra = nn.Module()


def label_loss(step: Step) -> Loss:
    """Return the cross-entropy with the labels: the loss of a round without targets."""
    total = functional.cross_entropy(step.outputs["logits"], step.labels)
    return Loss(total, total.detach())
