"""The server's interface of a method: an :class:`Aggregator` turns the outputs of a round into targets.

Targets depend on the outputs that the participants published and on the aggregator's own small state, and on nothing else.
So the same round gives the same targets wherever and whenever they are computed. Outputs and targets are named arrays;
nothing between the aggregator and the worker's objective knows their names.

A round may close without some students. Its targets are then made of the outputs of the others, and a student that was
away learns from all of them. A round without its teacher has no targets.
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
        limits: for each dimension its largest size, or None where it is the number of classes. The first worker that joins
            settles the sizes.
    """

    limits: tuple[int | None, ...]

    def largest(self, classes: int) -> list[int]:
        """Return the largest shape for a number of classes."""
        return [classes if limit is None else limit for limit in self.limits]

    def accepts(self, dims: list[int], classes: int) -> bool:
        """Return whether a shape is allowed."""
        return len(dims) == len(self.limits) and all(
            size == classes if limit is None else 1 <= size <= limit
            for size, limit in zip(dims, self.limits, strict=True)
        )

    def describe(self, classes: int) -> str:
        """Return the allowed shapes, for a message."""
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
    """The outputs that were published in a round, in the experiment's order.

    Attributes:
        students: the names of the K students that contributed.
        outputs: each named output of all students, [K, B, ...], float32.
        labels: the samples' classes, [B], int64.
        teachers: by the name of each teacher that contributed its named outputs, [B, ...], float32.
        held_out: each named output for the held-out samples, [K, N, ...], float32; empty in most rounds.
        held_out_labels: their classes, [N], int64; None in most rounds.
        state: the arrays that the aggregator returned with the round before; empty for the first.
        include_missing: whether students that did not contribute will ask for the targets.
    """

    students: tuple[str, ...]
    outputs: Arrays
    labels: torch.Tensor
    teachers: Mapping[str, Arrays] = field(default_factory=_no_teachers)
    held_out: Arrays = field(default_factory=_no_arrays)
    held_out_labels: torch.Tensor | None = None
    state: Arrays = field(default_factory=_no_arrays)
    include_missing: bool = False


@dataclass(frozen=True)
class Targets:
    """The targets of a round. A student without an array learns from the labels alone.

    Attributes:
        shared: named arrays for every student that is not in `each`.
        each: named arrays by student, where they differ.
        state: float32 arrays, journalled with this round and passed to the next.
    """

    shared: Arrays | None = None
    each: Mapping[str, Arrays] | None = None
    state: Arrays = field(default_factory=_no_arrays)


NOTHING = Targets(shared={})
"""The targets of a round whose students learn from the labels alone."""


class Aggregator(Protocol):
    """A method's part on the server.

    Attributes:
        heavy: whether `targets` takes milliseconds. The server then calls it beside its event loop.
        student: the outputs that a student publishes, by name.
        teacher: the outputs that a teacher publishes, by name.
    """

    heavy: bool
    student: Mapping[str, Output]
    teacher: Mapping[str, Output]

    def targets(self, inputs: RoundInputs) -> Targets:
        """Return the targets of one round."""
        ...
