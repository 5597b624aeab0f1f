"""Rounds for the aggregators of methods, and what they make of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from codistill.config.methods import Distillation
from codistill.methods.aggregator import Aggregator, RoundInputs, Targets
from codistill_server import methods

STUDENTS = ("ant", "bee", "cat")
PAIR, B, C = ("ant", "bee"), 4, 3
LABELS = torch.tensor([0, 1, 2, 0])


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def aggregator_of(settings: Any, teachers: tuple[str, ...] = ("old",)) -> Aggregator:
    """Return the aggregator of a run of two students."""
    aggregator = methods.create(settings, PAIR, teachers)
    assert aggregator is not None
    return aggregator


def round_inputs(logits: Tensor, labels: list[int], **more: Any) -> RoundInputs:
    """Return a round of the first students."""
    return RoundInputs(STUDENTS[: len(logits)], {"logits": logits}, torch.tensor(labels), **more)


def targets_of(settings: Distillation, inputs: RoundInputs) -> Targets:
    aggregator = methods.create(settings)
    assert aggregator is not None
    return aggregator.targets(inputs)


def shared_logits(settings: Distillation, inputs: RoundInputs) -> Tensor:
    """Return the targets of a method that has the same logits for all."""
    made = targets_of(settings, inputs)
    assert made.each is None
    assert made.shared is not None
    assert set(made.shared) == {"logits"}
    return made.shared["logits"]
