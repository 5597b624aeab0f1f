"""A student's optimiser, and its learning rate in each step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from codistill.config.training import Optimizer, Schedule

__all__ = ["build_optimizer", "learning_rate"]


def build_optimizer(trained: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """Return the optimiser of a module's trainable parameters."""
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if not settings.decay_norm_and_bias:  # biases and normalisation weights are the ones of one dimension or none
        groups = [
            {"params": [parameter for parameter in parameters if parameter.ndim > 1]},
            {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
    if settings.name == "sgd":
        return torch.optim.SGD(
            groups,
            lr=settings.lr,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            weight_decay=settings.weight_decay,
        )
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)


def learning_rate(peak: float, schedule: Schedule, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Return the learning rate of a step, a pure function of its number.

    Args:
        peak: the highest rate.
        schedule: the rate's course.
        step: the step, counted from 0.
        steps_per_epoch: steps in an epoch.
        epochs: epochs in the run.
    """
    warmup = schedule.warmup_epochs * steps_per_epoch
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule.name == "cosine":
        share = (step - warmup) / max(epochs * steps_per_epoch - warmup, 1)
        return schedule.min_lr + (peak - schedule.min_lr) * 0.5 * (1 + math.cos(math.pi * share))
    if schedule.name == "steps":
        passed = sum(step >= milestone * steps_per_epoch for milestone in schedule.milestones)
        return peak * schedule.gamma**passed
    return peak
