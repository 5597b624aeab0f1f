"""Whom an open round waits for, and when it goes on without them: pure functions of time and arrivals.

Words. A student is *awaited* while the frontier waits for it, else it is *absent*. The *deadline* of a round counts from
its first contribution; at the deadline, whoever is awaited and has not contributed becomes absent. A round closes as
soon as every awaited student has contributed. The *quorum* is the number of contributions, of present and absent
students alike, that a round must have to be given targets; below it the round closes without any and the students learn
from the labels alone.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass

__all__ = ["ArrivalLags", "Decision", "StragglerPolicy", "decide"]

_WINDOW = 64
_ENOUGH = 8
_SPREADS = 10.0
_SHORTEST = 2.0


@dataclass(frozen=True)
class StragglerPolicy:
    """How a run goes on without a student (``exchange.on_absence: proceed``).

    Attributes:
        quorum: contributions that a round needs to be given targets.
        round_deadline: seconds from a round's first contribution until it no longer waits; None follows the arrivals.
        evict_after: seconds of silence after which an absent student's session is ended; and that a student that has
            not joined since the server started is waited for.
    """

    quorum: int
    round_deadline: float | None
    evict_after: float


class ArrivalLags:
    """How late the last contribution of recent rounds was, from which the automatic deadline follows.

    The deadline is median + 10·MAD of the last 64 rounds' lags, a lag being the time from a round's first contribution
    to its last. It is at least 2 s, so that a pause (an evaluation, a checkpoint) costs nobody its place, and at most
    `evict_after`, which also holds until 8 rounds are known.
    """

    def __init__(self) -> None:
        self._lags: deque[float] = deque(maxlen=_WINDOW)

    def add(self, lag: float) -> None:
        """Takes in a closed round's lag, in seconds."""
        self._lags.append(lag)

    def deadline(self, absence: StragglerPolicy) -> float:
        """Returns the seconds that a round waits after its first contribution."""
        if absence.round_deadline is not None:
            return absence.round_deadline
        if len(self._lags) < _ENOUGH:
            return absence.evict_after
        median = statistics.median(self._lags)
        spread = statistics.median(abs(lag - median) for lag in self._lags)
        return min(max(median + _SPREADS * spread, _SHORTEST), absence.evict_after)


@dataclass(frozen=True)
class Decision:
    """What becomes of an open round.

    Attributes:
        close: whether it closes now.
        targets: whether it is given targets, if it closes.
        absent: the awaited students that it no longer waits for.
        reason: why, for people.
    """

    close: bool
    targets: bool
    absent: tuple[str, ...]
    reason: str


def decide(
    absence: StragglerPolicy,
    *,
    waited: float,
    deadline: float,
    awaited: Iterable[str],
    expected: Collection[str],
    contributed: Collection[str],
) -> Decision:
    """Returns what becomes of an open round.

    Args:
        absence: the rules.
        waited: seconds since the round's first contribution.
        deadline: :meth:`ArrivalLags.deadline`.
        awaited: the students that the round waits for, in the experiment's order.
        expected: the students that have not joined since the server started; they are given `evict_after`.
        contributed: the students whose contribution is in.
    """
    missing = [name for name in awaited if name not in contributed]
    late = tuple(name for name in missing if waited >= (absence.evict_after if name in expected else deadline))
    left = [name for name in missing if name not in late]
    count = f"{len(contributed)} contributions, quorum {absence.quorum}"
    if left:
        return Decision(False, False, late, f"waits for {', '.join(left)} since {waited:.1f} s; {count}")
    why = f"without {', '.join(late)} after {waited:.1f} s" if late else "every awaited student is in"
    enough = len(contributed) >= absence.quorum
    return Decision(True, enough, late, f"{why}; {count}" + ("" if enough else ": no targets"))
