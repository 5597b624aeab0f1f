"""Accuracy and loss of a model on a split of a data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from codistill.config.training import Training
from codistill_worker.data import Dataset, Split
from codistill_worker.training.devices import forward_pass
from codistill_worker.training.outputs import check_output
from codistill_worker.transfers import upload

__all__ = ["Score", "evaluate"]


@dataclass(frozen=True)
class Score:
    """A model's accuracy on a split, the share of correct samples, and its mean cross-entropy in nats."""

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
    """Return a model's score on a split of a data set, without augmentation; call `on_batch` before each batch."""
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    batches = torch.arange(len(split)).split(training.evaluation_batch_size)
    with torch.inference_mode():
        on_batch()
        for ids, images in zip(batches, split.stream(iter(batches)), strict=True):
            labels = upload(split.labels[ids], device)
            normalised = dataset.normalise(images, channels_last=training.channels_last)
            with forward_pass(device, training):
                logits = model(normalised)
            check_output("logits", logits, (len(ids), dataset.classes), model)
            logits = logits.float()
            correct += (logits.argmax(-1) == labels).sum()
            on_batch()
            loss += functional.cross_entropy(logits, labels, reduction="sum").double()
    return Score(int(correct) / len(split), float(loss) / len(split))
