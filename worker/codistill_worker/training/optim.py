"""A student's optimiser, and its learning rate in each step."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from codistill.config.training import Optimizer, Schedule

__all__ = ["build_optimizer", "learning_rate", "load_state"]


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


def load_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a state dict, which is copied, into an optimiser; lay each tensor out in memory as its parameter.

    A checkpoint's tensors are contiguous. Beside parameters in another layout they would keep the optimiser from its fused
    kernels for the rest of the run.

    Raises:
        ValueError, KeyError: the state is of another optimiser.
    """
    # A copy, as the optimiser would keep and change the tensors that it is given.
    optimizer.load_state_dict(copy.deepcopy(dict(state)))
    for parameter, kept in optimizer.state.items():
        for name, value in kept.items():
            if (
                isinstance(value, torch.Tensor)
                and value.shape == parameter.shape
                and value.stride() != parameter.stride()
            ):
                kept[name] = torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


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
