"""Finds a method's module by the name of the method."""

from __future__ import annotations

import importlib
from types import ModuleType

from torch import nn

from codistill.config.methods import Distillation
from codistill.methods import Logits, Objective, StudentContext
from codistill.process.randomness import seeded

__all__ = ["create", "teacher_network", "teaches_hidden_layers"]


def create(distillation: Distillation, context: StudentContext) -> Objective:
    """Return the objective of one student.

    Args:
        distillation: the experiment's section, with the student's overrides applied.
        context: the student.

    Raises:
        ConfigurationError: the student's model has no layer that is named, or a user's objective lacks an attribute.
        LoadError: a user's objective cannot be loaded.
    """
    with seeded(context.seed):
        return _module(distillation.method).objective(distillation, context)


def teacher_network(distillation: Distillation, context: StudentContext) -> nn.Module:
    """Return the network whose named outputs a teacher publishes.

    Raises:
        ConfigurationError: the teacher's model has no layer that is named.
    """
    module = _module(distillation.method)
    if not teaches_hidden_layers(distillation):
        return Logits(context.model)
    with seeded(context.seed):
        return module.teacher(distillation, context)


def teaches_hidden_layers(distillation: Distillation) -> bool:
    """Return whether a teacher publishes something else than its logits."""
    return hasattr(_module(distillation.method), "teacher")


def _module(method: str) -> ModuleType:
    return importlib.import_module(f"codistill_worker.methods.{method}")
