"""What a worker half is: a network that gives named outputs, and the loss that it makes of them and of the targets.

Targets are constants: they come over the wire and no gradient flows into them. Cross-entropies and divergences are
summed over classes and averaged over the batch's rows, in float32, with log-softmax, so they are finite wherever the
logits are.
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
    "labels_alone",
]

Arrays: TypeAlias = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Loss:
    """A step's loss.

    Attributes:
        total: what is minimised, a scalar with a gradient.
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
    """What a step's loss is made of.

    Attributes:
        outputs: the network's, each [B, ...], float32, with a gradient; "logits" [B, C] among them.
        labels: the samples' classes, [B], int64.
        targets: the method's named arrays, on the outputs' device; empty where nothing is exchanged.
        epoch: how many epochs are trained, with the fraction.
        epochs: how many the run has.
    """

    outputs: Arrays
    labels: torch.Tensor
    targets: Arrays = field(default_factory=_no_arrays)
    epoch: float = 0.0
    epochs: int = 1


class ImageShape(TypedDict):
    """What a model is built for; a size is height and width."""

    classes: int
    channels: int
    size: int


@dataclass(frozen=True)
class StudentContext:
    """Whom a half is made for.

    Attributes:
        name: the student's or teacher's.
        model: its model, on its device: [B, channels, size, size] to [B, C].
        shape: what the model was built for.
        teacher_shapes: returns the shapes of the teacher's outputs without the samples, for halves that learn a mapping
            onto them. It builds the teacher's model to see, so only those should ask.
        seed: of what a half draws, 63 bits; while a half is made, torch's own generator follows from it too.
    """

    name: str
    model: nn.Module
    shape: ImageShape
    teacher_shapes: Callable[[], Mapping[str, tuple[int, ...]]]
    seed: int = 0


class Objective(Protocol):
    """The worker half of a method, for one student.

    Attributes:
        network: gives the named outputs of a batch of images; contains the student's model, and may train more than it.
        extra: modules that the student's optimiser trains besides the model; they are in the checkpoints and in nothing
            that is exported.
        publishes: the names of the outputs that the student publishes in a round that exchanges.
        measures_held_out: whether it also publishes them for the held-out samples, once an epoch.
    """

    network: nn.Module
    extra: nn.Module
    publishes: tuple[str, ...]
    measures_held_out: bool

    def loss(self, step: Step) -> Loss:
        """Returns the loss of one step."""
        ...


class Logits(nn.Module):
    """A model whose only output is its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> Arrays:
        """Returns `logits`, [B, C]."""
        return {"logits": self.model(images)}


class LogitsObjective:
    """What a half is that needs the model's logits and trains nothing else; it lacks the loss."""

    publishes: tuple[str, ...] = ()
    measures_held_out = False

    def __init__(self, subject: StudentContext) -> None:
        self.network: nn.Module = Logits(subject.model)
        self.extra = nn.Module()


def labels_alone(step: Step) -> Loss:
    """Returns cross-entropy with the labels: the loss of a round without targets."""
    total = functional.cross_entropy(step.outputs["logits"], step.labels)
    return Loss(total, total.detach())
