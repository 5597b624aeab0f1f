"""Which worker half belongs to a method, and what its teachers publish."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from codistill.config.methods import Distillation
from codistill_worker.methods import custom, independent, layered, mutual, taught
from codistill_worker.methods.base import Logits, Subject, WorkerHalf

__all__ = ["create", "teacher_network"]

_STUDENTS: Mapping[str, Callable[[Any, Subject], WorkerHalf]] = {
    "independent": independent.IndependentHalf,
    "kd": taught.KdHalf,
    "logit_regression": taught.LogitRegressionHalf,
    "born_again": taught.BornAgainHalf,
    "vid": layered.VidHalf,
    "rkd_distance": layered.RelationalHalf,
    "rkd_angle": layered.RelationalHalf,
    "rkd": layered.RelationalHalf,
    "fddml": taught.TaughtMutualHalf,
    "hddml": taught.TaughtMutualHalf,
    "dml": mutual.DmlHalf,
    "dcm": layered.DcmHalf,
    "kdcl": mutual.KdclHalf,
    "cross_architecture": mutual.CrossArchitectureHalf,
    "custom": custom.load,
}
_TEACHERS: Mapping[str, Callable[[Any, Subject], nn.Module]] = {
    "vid": layered.vid_teacher,
    "rkd_distance": layered.relational_teacher,
    "rkd_angle": layered.relational_teacher,
    "rkd": layered.relational_teacher,
}
"""Of those methods whose teachers publish something else than logits."""


def create(distillation: Distillation, subject: Subject) -> WorkerHalf:
    """Returns the worker half of an experiment's method, with one student's overrides applied.

    Raises:
        ConfigurationError: the student's model has no layer that is named; or a user's own half cannot be loaded.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(subject.seed)
        return _STUDENTS[distillation.method](distillation, subject)


def teacher_network(distillation: Distillation, subject: Subject) -> nn.Module:
    """Returns the network whose named outputs a teacher publishes.

    Raises:
        ConfigurationError: the teacher's model has no layer that is named.
    """
    make = _TEACHERS.get(distillation.method)
    return Logits(subject.model) if make is None else make(distillation, subject)
