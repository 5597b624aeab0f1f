"""How well the students' ensemble classifies training samples, and how far two students agree."""

from __future__ import annotations

import itertools
import math
from collections import Counter, deque
from dataclasses import dataclass

import torch

__all__ = ["Agreement"]

_ROUNDS = 64  # of an epoch, evenly spaced: enough for half a point, and next to nothing of a round's time


@dataclass(frozen=True)
class _MeasuredRound:
    """Counts of one round."""

    round_number: int
    students: tuple[str, ...]
    samples: int
    correct: int
    """Samples that the mean of the students' probabilities classifies correctly."""
    differ: torch.Tensor
    """Samples on which two students differ, [K, K]."""


class Agreement:
    """Measures over the last epoch's rounds; of a long epoch, over an evenly spaced share of them.

    The rounds are chosen by their numbers, so the measures are the same on every machine.
    """

    def __init__(self) -> None:
        self._measured: deque[_MeasuredRound] = deque(maxlen=_ROUNDS)

    def measure(
        self,
        round_number: int,
        students: tuple[str, ...],
        logits: torch.Tensor,
        labels: torch.Tensor,
        rounds_per_epoch: int = 0,
    ) -> None:
        """Measure one round.

        Args:
            round_number: the round's.
            students: the names of the K students that contributed.
            logits: theirs, [K, B, C].
            labels: the samples' classes, int64 [B].
            rounds_per_epoch: the number of rounds in an epoch; 0 where it is not known yet, and nothing is left out then.
        """
        if round_number % math.ceil(max(rounds_per_epoch, 1) / _ROUNDS):
            return
        votes = logits.argmax(-1)
        ensemble = logits.softmax(-1).sum(0).argmax(-1)
        differ = (votes[:, None] != votes[None]).sum(-1)
        correct = int((ensemble == labels).sum())
        self._measured.append(_MeasuredRound(round_number, students, len(labels), correct, differ))
        while rounds_per_epoch and self._measured[0].round_number <= round_number - rounds_per_epoch:
            self._measured.popleft()

    @property
    def ensemble_accuracy(self) -> float | None:
        """The share of samples that the students' mean probability classifies correctly; None before the first round."""
        samples = sum(measured.samples for measured in self._measured)
        return sum(measured.correct for measured in self._measured) / samples if samples else None

    @property
    def disagreement(self) -> dict[tuple[str, str], float]:
        """The share of samples on which two students differ, for each pair that contributed to the same round."""
        differ: Counter[tuple[str, str]] = Counter()
        samples: Counter[tuple[str, str]] = Counter()
        for students, rounds in self._by_students().items():
            total = sum(measured.samples for measured in rounds)
            counts = torch.stack([measured.differ for measured in rounds]).sum(0).tolist()
            for (row, first), (column, second) in itertools.combinations(enumerate(students), 2):
                differ[first, second] += counts[row][column]
                samples[first, second] += total
        return {pair: differ[pair] / samples[pair] for pair in samples}

    def _by_students(self) -> dict[tuple[str, ...], list[_MeasuredRound]]:
        groups: dict[tuple[str, ...], list[_MeasuredRound]] = {}
        for measured in self._measured:
            groups.setdefault(measured.students, []).append(measured)
        return groups
