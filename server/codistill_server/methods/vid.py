"""Variational information distillation (Ahn et al. 2019) of a teacher's hidden layers."""

from __future__ import annotations

from collections.abc import Sequence

from codistill.config.methods import Vid
from codistill.methods.aggregator import FEATURES, Aggregator
from codistill_server.methods.relay import Relay

__all__ = ["aggregator"]


def aggregator(settings: Vid, students: Sequence[str], teachers: Sequence[str]) -> Aggregator:
    """Return an aggregator that gives every student the teacher's feature maps, `features/1` and so on, [B, channels, height, width]."""
    del students, teachers
    return Relay({f"features/{stage}": FEATURES for stage in range(1, settings.stages + 1)})
