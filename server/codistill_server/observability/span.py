"""Neighbouring closed rounds, merged into one record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from codistill.rundir.records import ParticipantWait, RoundsClosed

__all__ = ["Span"]


class Span:
    """Neighbouring rounds that have closed and are not recorded yet.

    Args:
        first: the first round's number.
        started: when the round before it closed, or when its own first contribution arrived.
    """

    def __init__(self, first: int, started: float) -> None:
        self.started = started
        self.last = first
        self._first = first
        self._waits: list[float] = []
        self._last_rounds: dict[str, int] = {}
        self._last_seconds: dict[str, float] = {}
        self._missed: Counter[str] = Counter()
        self._without_targets = 0

    def add(self, round_number: int, arrived: Mapping[str, float], missing: Sequence[str], *, targets: bool) -> float:
        """Add a closed round.

        Args:
            round_number: the round's.
            arrived: when each contribution arrived, by participant.
            missing: the participants without a contribution.
            targets: whether the round had any.

        Returns:
            The time from the first contribution to the last, in seconds.
        """
        self.last = round_number
        order = sorted(arrived, key=lambda name: arrived[name])
        wait = arrived[order[-1]] - arrived[order[0]]
        self._waits.append(wait)
        if len(order) > 1:
            last = order[-1]
            self._last_rounds[last] = self._last_rounds.get(last, 0) + 1
            alone = arrived[last] - arrived[order[-2]]
            self._last_seconds[last] = self._last_seconds.get(last, 0.0) + alone
        self._missed.update(missing)
        self._without_targets += not targets
        return wait

    def record(
        self,
        time: float,
        ended: float,
        steps_trained: int,
        ensemble_accuracy: float | None,
        disagreement: Mapping[tuple[str, str], float],
    ) -> RoundsClosed:
        """Return the span's record.

        Args:
            time: the record's, in seconds since 1970.
            ended: when the last round closed, by the clock of `started`.
            steps_trained: the number of steps up to and with that of the last round.
            ensemble_accuracy: of the students together, by now.
            disagreement: of each pair of students, by now.
        """
        waits = sorted(self._waits)
        return RoundsClosed(
            time=time,
            first=self._first,
            last=self.last,
            steps_trained=steps_trained,
            seconds=ended - self.started,
            wait_p50=waits[len(waits) // 2],
            wait_max=waits[-1],
            waits={
                name: ParticipantWait(rounds=count, seconds=self._last_seconds[name])
                for name, count in self._last_rounds.items()
            },
            ensemble_accuracy=ensemble_accuracy,
            disagreement={f"{first}|{second}": ratio for (first, second), ratio in disagreement.items()},
            missed=dict(self._missed),
            without_targets=self._without_targets,
        )
