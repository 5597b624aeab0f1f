"""Which server half belongs to a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from codistill.config.methods import Distillation
from codistill.methods.aggregator import EMBEDDING, FEATURES, LOGITS, Aggregator
from codistill_server.methods import custom, layered, mutual, taught

__all__ = ["create"]


@dataclass(frozen=True)
class _Run:
    """What a half is made for."""

    settings: Any
    students: Sequence[str]
    teachers: Sequence[str]


def _features(run: _Run) -> Aggregator:
    return taught.Taught({f"features/{number}": FEATURES for number in range(1, run.settings.stages + 1)})


def _embedding(run: _Run) -> Aggregator:
    del run
    return taught.Taught({"embedding": EMBEDDING})


def _logits(run: _Run) -> Aggregator:
    del run
    return taught.Taught({"logits": LOGITS})


_HALVES: Mapping[str, Callable[[_Run], Aggregator]] = {
    "kd": _logits,
    "logit_regression": _logits,
    "born_again": lambda run: taught.BornAgain(run.students, run.teachers),
    "vid": _features,
    "rkd_distance": _embedding,
    "rkd_angle": _embedding,
    "rkd": _embedding,
    "fddml": lambda run: taught.TaughtMutual(run.students),
    "hddml": lambda run: taught.TaughtMutual(run.students[:1]),
    "dml": lambda run: mutual.Mutual(run.settings.temperature),
    "dcm": lambda run: layered.Dense(run.settings.stages),
    "kdcl": lambda run: mutual.ensemble_of(run.settings),
    "cross_architecture": lambda run: mutual.Mean(run.settings.temperature),
    "custom": lambda run: custom.load(run.settings),
}


def create(distillation: Distillation, students: Sequence[str] = (), teachers: Sequence[str] = ()) -> Aggregator | None:
    """Returns the server half of an experiment's method; None if it exchanges nothing.

    Args:
        distillation: the experiment's section.
        students: the names of the run's students, in order; not all halves look at them.
        teachers: the names of its teachers.

    Raises:
        LoadError: it is a user's own, and cannot be loaded or is no half.
    """
    return _HALVES[distillation.method](_Run(distillation, students, teachers)) if distillation.exchanges else None
