"""What students and teachers have in common: models on devices, and the outputs that they publish."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from codistill.config.experiment import Experiment
from codistill.config.training import Training
from codistill_worker import methods, models
from codistill_worker.data import Dataset, Split, augmentation

__all__ = [
    "Score",
    "autocast",
    "evaluate",
    "image_shape",
    "output_shapes",
    "placed",
    "set_threads",
    "teacher_shapes",
    "to_cpu",
    "view_of",
]


def image_shape(dataset: Dataset) -> methods.ImageShape:
    """Returns classes, channels and size of a data set, as a model is built with."""
    return {"classes": dataset.classes, "channels": dataset.channels, "size": dataset.height}


def placed(model: nn.Module, device: torch.device, training: Training) -> nn.Module:
    """Returns a model on its device, its weights in the order in memory that the experiment asks for."""
    memory = torch.channels_last if training.channels_last else torch.contiguous_format
    return model.to(device, memory_format=memory)  # pyright: ignore[reportCallIssue]


def autocast(device: torch.device, training: Training) -> contextlib.AbstractContextManager[object]:
    """Returns what a forward pass runs under, by the experiment's precision."""
    if training.precision == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def set_threads(training: Training) -> None:
    """Other numbers of threads sum in other orders, so each participant has its own, whoever shares its process."""
    if torch.get_num_threads() != training.threads:
        torch.set_num_threads(training.threads)


def view_of(experiment: Experiment, name: str) -> str:
    """Returns whose draws a participant's augmentation uses: its own, or those of all, which are nobody's."""
    return "" if experiment.shared_view else name


def output_shapes(network: nn.Module, shape: methods.ImageShape, device: torch.device) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a network's named outputs, without the samples, by running it on two empty images."""
    images = torch.zeros(2, shape["channels"], shape["size"], shape["size"], device=device)
    network.eval()
    with torch.no_grad():
        found = {name: tuple(value.shape[1:]) for name, value in network(images).items()}
    network.train()
    return found


def teacher_shapes(experiment: Experiment, shape: methods.ImageShape) -> Mapping[str, tuple[int, ...]]:
    """Returns the shapes of what the experiment's first teacher publishes; its model is built for it, without weights."""
    plan = experiment.teacher_plan(experiment.teacher_names[0])
    model = models.build(plan.teacher.model, **shape, args=plan.teacher.model_args, seed=0)
    subject = methods.StudentContext(plan.teacher.name, model, shape, dict)
    return output_shapes(methods.teacher_network(plan.distillation, subject), shape, torch.device("cpu"))


@dataclass(frozen=True)
class Score:
    """How a model does on a split: share of correct samples, and mean cross-entropy in nats."""

    accuracy: float
    loss: float


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    split: Split,
    training: Training,
    device: torch.device,
    on_batch: Callable[[], None],
) -> Score:
    """Measures a model on a split of a data set, without augmentation; calls `on_batch` before each batch."""
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    batches = torch.arange(len(split)).split(training.evaluation_batch_size)
    with torch.inference_mode():
        on_batch()
        for ids, images in zip(batches, split.stream(iter(batches)), strict=True):
            labels = split.labels[ids].to(device, non_blocking=True)
            normalised = augmentation.normalise(
                images, dataset.mean, dataset.std, dtype=torch.float32, channels_last=training.channels_last
            )
            with autocast(device, training):
                logits = model(normalised).float()
            correct += (logits.argmax(-1) == labels).sum()
            on_batch()
            loss += functional.cross_entropy(logits, labels, reduction="sum").double()
    return Score(int(correct) / len(split), float(loss) / len(split))


def to_cpu(arrays: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Brings arrays from a device to the CPU, without their gradients."""
    if device.type != "cuda":
        return {name: value.detach() for name, value in arrays.items()}
    landed: dict[str, torch.Tensor] = {}
    for name, value in arrays.items():
        # From page-locked memory the copy runs beside what else the device does; only its end is waited for.
        landed[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        landed[name].copy_(value.detach(), non_blocking=True)
    torch.cuda.current_stream(device).synchronize()
    return landed
