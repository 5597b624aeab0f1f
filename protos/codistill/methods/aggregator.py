"""What a server half is: which outputs it takes, and the targets that it makes of a round's.

A half is a function of what the participants published and of its own small state, and of nothing else, so that the
same round gives the same targets wherever and whenever it is computed. All that lies between it and the worker's half
of the same name moves named arrays and knows none of their names.

A round may have been closed without some students. What is made then is made of those that are there, and whoever was
not, learns from all of them. Without the teacher there is nothing to be made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch

__all__ = ["EMBEDDING", "FEATURES", "LOGITS", "NOTHING", "Aggregator", "Arrays", "Output", "RoundInputs", "Targets"]

Arrays: TypeAlias = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Output:
    """The shape of a named output, without the samples.

    Attributes:
        limits: for each dimension the largest that it may be, of which the first worker that joins settles the size; or
            None where it is the number of classes.
    """

    limits: tuple[int | None, ...]

    def largest(self, classes: int) -> list[int]:
        """Returns the largest shape, with so many classes."""
        return [classes if limit is None else limit for limit in self.limits]

    def takes(self, dims: list[int], classes: int) -> bool:
        """Returns whether a shape is allowed."""
        return len(dims) == len(self.limits) and all(
            size == classes if limit is None else 1 <= size <= limit
            for size, limit in zip(dims, self.limits, strict=True)
        )

    def describe(self, classes: int) -> str:
        """Returns what is allowed, for a message."""
        return f"[{', '.join(str(classes) if limit is None else f'up to {limit}' for limit in self.limits)}]"


LOGITS = Output((None,))
"""[C]."""

FEATURES = Output((2048, 8, 8))
"""A hidden layer's map, [channels, height, width], pooled to at most 8×8."""

EMBEDDING = Output((8192,))
"""A hidden layer's vector, [D]."""


def _no_arrays() -> dict[str, torch.Tensor]:
    return {}


def _no_teachers() -> dict[str, Arrays]:
    return {}


@dataclass(frozen=True)
class RoundInputs:
    """What was published in a round, in the experiment's order.

    Attributes:
        students: the names of the K students that contributed.
        outputs: each named output of all students, [K, B, ...], float32.
        labels: the samples' classes, [B], int64.
        teachers: by the name of each teacher that contributed its named outputs, [B, ...], float32.
        held_out: each named output for the held-out samples, [K, N, ...], float32; empty in most rounds.
        held_out_labels: their classes, [N], int64; None in most rounds.
        state: what the half returned with the round before; empty for the first.
        include_absent: whether students that did not contribute will ask for the targets.
    """

    students: tuple[str, ...]
    outputs: Arrays
    labels: torch.Tensor
    teachers: Mapping[str, Arrays] = field(default_factory=_no_teachers)
    held_out: Arrays = field(default_factory=_no_arrays)
    held_out_labels: torch.Tensor | None = None
    state: Arrays = field(default_factory=_no_arrays)
    include_absent: bool = False


@dataclass(frozen=True)
class Targets:
    """What a round's targets are. A student that is given no array learns from the labels alone.

    Attributes:
        each: named arrays by student, where they differ.
        shared: named arrays for every student that has none of its own.
        state: float32 arrays to be handed back with the next round; journalled with this one.
    """

    shared: Arrays | None = None
    each: Mapping[str, Arrays] | None = None
    state: Arrays = field(default_factory=_no_arrays)


NOTHING = Targets(shared={})
"""The targets of a round that nothing can be made of."""


class Aggregator(Protocol):
    """The server half of a method.

    Attributes:
        heavy: whether `targets` takes milliseconds, so that a server does it beside its event loop.
        student: the outputs that a student publishes, by name.
        teacher: the outputs that a teacher publishes, by name.
    """

    heavy: bool
    student: Mapping[str, Output]
    teacher: Mapping[str, Output]

    def targets(self, gathered: RoundInputs) -> Targets:
        """Returns the targets of one round."""
        ...
