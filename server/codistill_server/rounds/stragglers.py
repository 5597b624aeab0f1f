"""How long an open round waits, and for which participants: pure functions of time and arrivals.

Words. A participant is *awaited* while the frontier waits for it, else it is *skipped*. The *deadline* of a round counts from
its first contribution. At the deadline, every awaited participant that has not contributed becomes skipped. A round closes as
soon as every awaited participant has contributed. The *quorum* is the number of contributions that a round must have to be
given targets; those of skipped participants count too. Below the quorum the round closes without targets, and the participants
learn from the labels alone.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from codistill.config.experiment import Experiment

__all__ = ["ArrivalLags", "CloseDecision", "StragglerPolicy", "close_decision", "straggler_policy"]

_REMEMBERED_ROUNDS = 64
_ROUNDS_NEEDED = 8
_SPREADS = 10.0
_SHORTEST_DEADLINE = 2.0


@dataclass(frozen=True)
class StragglerPolicy:
    """How a run continues without a participant (``exchange.on_absence: proceed``).

    Attributes:
        quorum: contributions that a round needs to be given targets.
        round_deadline: seconds from a round's first contribution until it no longer waits; None derives them from recent arrivals.
        evict_after: seconds of silence after which a skipped participant's session is ended. A participant that has not joined
            since the server started is waited for as long.
    """

    quorum: int
    round_deadline: float | None
    evict_after: float


def straggler_policy(experiment: Experiment) -> StragglerPolicy | None:
    """Return how an experiment's run continues without a participant; None where it waits for every one."""
    exchange = experiment.exchange
    if exchange.on_absence == "wait":
        return None
    deadline = None if exchange.round_deadline == "auto" else exchange.round_deadline
    return StragglerPolicy(exchange.quorum, deadline, exchange.evict_after)


class ArrivalLags:
    """How late the last contribution of recent rounds was; the automatic deadline follows from it.

    A lag is the time from a round's first contribution to its last. The deadline is median + 10·MAD of the last 64 rounds'
    lags. It is at least 2 s, so that a pause (an evaluation, a checkpoint) makes no participant skipped. It is at most
    `evict_after`, which also holds until 8 rounds are known.
    """

    def __init__(self) -> None:
        self._lags: deque[float] = deque(maxlen=_REMEMBERED_ROUNDS)

    def add(self, lag: float) -> None:
        """Record a closed round's lag, in seconds."""
        self._lags.append(lag)

    def deadline(self, policy: StragglerPolicy) -> float:
        """Return the seconds that a round waits after its first contribution."""
        if policy.round_deadline is not None:
            return policy.round_deadline
        if len(self._lags) < _ROUNDS_NEEDED:
            return policy.evict_after
        median = statistics.median(self._lags)
        spread = statistics.median(abs(lag - median) for lag in self._lags)
        return min(max(median + _SPREADS * spread, _SHORTEST_DEADLINE), policy.evict_after)


@dataclass(frozen=True)
class CloseDecision:
    """Whether an open round closes.

    Attributes:
        close: whether it closes now.
        targets: whether it is given targets, if it closes.
        skipped: the awaited participants that it no longer waits for.
        reason: why, for people.
    """

    close: bool
    targets: bool
    skipped: tuple[str, ...]
    reason: str


def close_decision(
    policy: StragglerPolicy,
    *,
    waited: float,
    deadline: float,
    awaited: Iterable[str],
    expected: Collection[str],
    contributed: Collection[str],
) -> CloseDecision:
    """Return whether an open round closes.

    Args:
        policy: how the run continues without a participant.
        waited: seconds since the round's first contribution.
        deadline: seconds that the round waits; see :meth:`ArrivalLags.deadline`.
        awaited: the participants that the round waits for, in the experiment's order.
        expected: the participants that have not joined since the server started; they are given `evict_after`.
        contributed: the participants whose contributions have arrived.
    """
    missing = [participant for participant in awaited if participant not in contributed]
    late = tuple(
        participant
        for participant in missing
        if waited >= (policy.evict_after if participant in expected else deadline)
    )
    still_awaited = [participant for participant in missing if participant not in late]
    count = f"{len(contributed)} contributions, quorum {policy.quorum}"
    if still_awaited:
        return CloseDecision(False, False, late, f"waits for {', '.join(still_awaited)} since {waited:.1f} s; {count}")
    why = f"{', '.join(late)} had not contributed after {waited:.1f} s" if late else "every awaited participant is in"
    enough = len(contributed) >= policy.quorum
    return CloseDecision(True, enough, late, f"{why}; {count}" + ("" if enough else ": no targets"))
