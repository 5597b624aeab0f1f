"""Which server half belongs to a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from codistill.distillation import Distillation
from codistill_server.methods import mutual, taught
from codistill_server.methods.mechanism import ServerHalf

__all__ = ["create"]

_HALVES: Mapping[str, Callable[[Any], ServerHalf]] = {
    "kd": lambda _: taught.Taught(),
    "logit_regression": lambda _: taught.Taught(),
    "dml": lambda settings: mutual.Mutual(settings.temperature),
    "kdcl": mutual.ensemble_of,
    "cross_architecture": lambda settings: mutual.Mean(settings.temperature),
}


def create(distillation: Distillation) -> ServerHalf | None:
    """Returns the server half of an experiment's method; None if it exchanges nothing."""
    return _HALVES[distillation.method](distillation) if distillation.exchanges else None
