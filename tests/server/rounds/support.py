"""Shared by the tests of the rounds' core: samples and contributions, a join, and how long a machine runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings

from codistill_server.rounds.actions import Admit
from codistill_server.rounds.events import Contribution, Join, Samples
from codistill_server.rounds.machine import Rounds


def samples(ids: Sequence[int], labels: Sequence[int] | None = None) -> Samples:
    """Return samples of these ids, of class 0 unless given."""
    classes = [0] * len(ids) if labels is None else labels
    return Samples(np.array(ids, "<i8").tobytes(), np.array(classes, "<i8").tobytes())


def contribution(round_number: int, payload: Any = "", **changes: Any) -> Contribution:
    """Return a contribution to a round, with three samples that are the round's own; those of round 0 are 7, 8, 9."""
    own = samples(range(10 * round_number + 7, 10 * round_number + 10))
    return Contribution(round_number, changes.pop("samples", own), payload=payload, **changes)


def joined(rounds: Rounds, participant: str, first_round: int = 0, now: float = 0.0) -> int:
    """Join and return the session."""
    admit = rounds.apply(Join(participant, first_round), now)[-1]
    assert isinstance(admit, Admit)
    return admit.session_id


def machine_settings(examples: int, steps: int) -> settings:
    """Return how long a machine of faults is run; a failure prints what replays it."""
    return settings(
        max_examples=examples,
        stateful_step_count=steps,
        suppress_health_check=[HealthCheck.too_slow],
        print_blob=True,
    )
