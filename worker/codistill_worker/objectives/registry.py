"""Which worker half belongs to a method, and what its teachers publish."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from codistill.distillation import Distillation
from codistill_worker.objectives import alone, mutual, taught
from codistill_worker.objectives.mechanism import Logits, Subject, WorkerHalf

__all__ = ["create", "teacher_network"]

_STUDENTS: Mapping[str, Callable[[Any, Subject], WorkerHalf]] = {
    "independent": alone.IndependentHalf,
    "kd": taught.KdHalf,
    "logit_regression": taught.LogitRegressionHalf,
    "dml": mutual.DmlHalf,
    "kdcl": mutual.KdclHalf,
    "cross_architecture": mutual.CrossArchitectureHalf,
}
_TEACHERS: Mapping[str, Callable[[Any, Subject], nn.Module]] = {}
"""Of those methods whose teachers publish something else than logits."""


def create(distillation: Distillation, subject: Subject) -> WorkerHalf:
    """Returns the worker half of an experiment's method, with one student's overrides applied."""
    return _STUDENTS[distillation.method](distillation, subject)


def teacher_network(distillation: Distillation, subject: Subject) -> nn.Module:
    """Returns the network whose named outputs a teacher publishes."""
    make = _TEACHERS.get(distillation.method)
    return Logits(subject.model) if make is None else make(distillation, subject)
