"""The exchanged arrays, and the rounds of one worker."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

__all__ = ["Array", "BenchmarkError", "Configuration", "Workload"]

Array: TypeAlias = np.ndarray[Any, Any]

_WARMUP = 10


class BenchmarkError(RuntimeError):
    """A measurement failed; the text says where."""


@dataclass(frozen=True)
class Configuration:
    """The shape of the logits, and the number of workers.

    Attributes:
        batch: B, the rows of each worker's logits.
        classes: C, their columns.
        workers: N.
    """

    batch: int
    classes: int
    workers: int


@dataclass(frozen=True)
class Workload:
    """One worker's part of a measurement.

    Attributes:
        configuration: what is exchanged.
        position: the worker's, from 0.
        rounds: how many are timed, after a few that are not.
        limit: seconds that any wait may take.
    """

    configuration: Configuration
    position: int
    rounds: int
    limit: float

    @property
    def total_rounds(self) -> int:
        """All rounds, those to warm up included."""
        return _WARMUP + self.rounds

    # Arrays, not tensors, as those are what Ray's actors receive.

    def logits(self) -> Array:
        """Return what this worker publishes, float32 [B, C]."""
        size = (self.configuration.batch, self.configuration.classes)
        return np.random.default_rng(self.position).standard_normal(size, np.float32)

    def labels(self) -> Array:
        """Return the labels, the same for all workers, int64 [B]."""
        return np.random.default_rng(0).integers(self.configuration.classes, size=self.configuration.batch)

    def time(self, round_trip: Callable[[int], torch.Tensor]) -> list[float]:
        """Call `round_trip` with each round's number, and return how many seconds each timed one took."""
        for round_number in range(_WARMUP):
            round_trip(round_number)
        seconds: list[float] = []
        before = time.perf_counter()
        for round_number in range(_WARMUP, self.total_rounds):
            round_trip(round_number)
            now = time.perf_counter()
            seconds.append(now - before)
            before = now
        return seconds
