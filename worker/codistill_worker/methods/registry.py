"""Which worker half belongs to a method, and what its teachers publish."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from codistill.config.methods import Distillation
from codistill.methods.objective import Logits, Objective, StudentContext
from codistill_worker.methods import custom, independent, layered, mutual, taught

__all__ = ["create", "teacher_network"]

_STUDENTS: Mapping[str, Callable[[Any, StudentContext], Objective]] = {
    "independent": independent.IndependentObjective,
    "kd": taught.KdObjective,
    "logit_regression": taught.LogitRegressionObjective,
    "born_again": taught.BornAgainObjective,
    "vid": layered.VidObjective,
    "rkd_distance": layered.RelationalObjective,
    "rkd_angle": layered.RelationalObjective,
    "rkd": layered.RelationalObjective,
    "fddml": taught.TaughtMutualObjective,
    "hddml": taught.TaughtMutualObjective,
    "dml": mutual.DmlObjective,
    "dcm": layered.DcmObjective,
    "kdcl": mutual.KdclObjective,
    "cross_architecture": mutual.CrossArchitectureObjective,
    "custom": custom.load,
}
_TEACHERS: Mapping[str, Callable[[Any, StudentContext], nn.Module]] = {
    "vid": layered.vid_teacher,
    "rkd_distance": layered.relational_teacher,
    "rkd_angle": layered.relational_teacher,
    "rkd": layered.relational_teacher,
}
"""Of those methods whose teachers publish something else than logits."""


def create(distillation: Distillation, subject: StudentContext) -> Objective:
    """Returns the worker half of an experiment's method, with one student's overrides applied.

    Raises:
        ConfigurationError: the student's model has no layer that is named; or a user's own half cannot be loaded.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(subject.seed)
        return _STUDENTS[distillation.method](distillation, subject)


def teacher_network(distillation: Distillation, subject: StudentContext) -> nn.Module:
    """Returns the network whose named outputs a teacher publishes.

    Raises:
        ConfigurationError: the teacher's model has no layer that is named.
    """
    make = _TEACHERS.get(distillation.method)
    return Logits(subject.model) if make is None else make(distillation, subject)
