"""Which server half belongs to a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from codistill.distillation import Distillation
from codistill_server.methods import custom, layered, mutual, taught
from codistill_server.methods.mechanism import EMBEDDING, FEATURES, ServerHalf

__all__ = ["create"]

_Names: TypeAlias = Sequence[str]


def _features(settings: Any) -> ServerHalf:
    return taught.Taught({f"features/{number}": FEATURES for number in range(1, settings.stages + 1)})


def _embedding() -> ServerHalf:
    return taught.Taught({"embedding": EMBEDDING})


_HALVES: Mapping[str, Callable[[Any, _Names, _Names], ServerHalf]] = {
    "kd": lambda *_: taught.Taught(),
    "logit_regression": lambda *_: taught.Taught(),
    "born_again": lambda _, students, teachers: taught.BornAgain(students, teachers),
    "vid": lambda settings, *_: _features(settings),
    "rkd_distance": lambda *_: _embedding(),
    "rkd_angle": lambda *_: _embedding(),
    "rkd": lambda *_: _embedding(),
    "fddml": lambda _, students, __: taught.TaughtMutual(students),
    "hddml": lambda _, students, __: taught.TaughtMutual(students[:1]),
    "dml": lambda settings, *_: mutual.Mutual(settings.temperature),
    "dcm": lambda settings, *_: layered.Dense(settings.stages),
    "kdcl": lambda settings, *_: mutual.ensemble_of(settings),
    "cross_architecture": lambda settings, *_: mutual.Mean(settings.temperature),
    "custom": lambda settings, *_: custom.load(settings),
}


def create(distillation: Distillation, students: _Names = (), teachers: _Names = ()) -> ServerHalf | None:
    """Returns the server half of an experiment's method; None if it exchanges nothing.

    Args:
        distillation: the experiment's section.
        students: the names of the run's students, in order; not all halves look at them.
        teachers: the names of its teachers.

    Raises:
        LoadError: it is a user's own, and cannot be loaded or is no half.
    """
    return _HALVES[distillation.method](distillation, students, teachers) if distillation.exchanges else None
