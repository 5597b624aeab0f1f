"""Finds a method's module by the name of the method."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from codistill.config.methods import Distillation
from codistill.methods.aggregator import Aggregator

__all__ = ["create"]


def create(distillation: Distillation, students: Sequence[str] = (), teachers: Sequence[str] = ()) -> Aggregator | None:
    """Return the aggregator of an experiment's method; None if the method exchanges nothing.

    Args:
        distillation: the experiment's section.
        students: the names of the run's students, in order; most methods do not need them.
        teachers: the names of its teachers, in order.

    Raises:
        LoadError: a user's own aggregator cannot be loaded, or lacks an attribute.
    """
    if not distillation.exchanges:
        return None
    module = import_module(f"codistill_server.methods.{distillation.method}")
    return module.aggregator(distillation, students, teachers)
