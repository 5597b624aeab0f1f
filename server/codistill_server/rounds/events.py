"""The events of the rounds of a run: the input of :mod:`codistill_server.rounds.machine`.

Events are plain values; what a contribution carries is opaque here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

__all__ = [
    "Contribute",
    "Contribution",
    "Decided",
    "Disconnect",
    "Event",
    "Join",
    "Leave",
    "LeaveReason",
    "ParticipantRecord",
    "Progress",
    "Restored",
    "Samples",
    "Tick",
]


class LeaveReason(Enum):
    """Why a participant leaves."""

    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True)
class Samples:
    """The samples of a contribution: ids and labels, each little-endian int64."""

    ids: bytes
    labels: bytes

    def difference(self, theirs: Samples) -> str:
        """Describe where other samples first differ from these, which are the round's."""
        ours = self._pairs()
        other = theirs._pairs()
        if len(ours) != len(other):
            return f"{len(other)} samples, the round has {len(ours)}"
        position = int(np.flatnonzero((ours != other).any(axis=1))[0])
        (our_id, our_label), (their_id, their_label) = ours[position], other[position]
        return (
            f"at position {position} sample {their_id} with label {their_label}, "
            f"the round has sample {our_id} with label {our_label}"
        )

    def _pairs(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.stack([np.frombuffer(self.ids, "<i8"), np.frombuffer(self.labels, "<i8")], axis=1)


@dataclass(frozen=True)
class Contribution:
    """The arrays that a participant publishes in a round; `payload` is opaque here."""

    round: int
    samples: Samples
    held_out: Samples | None = None
    payload: Any = None


@dataclass(frozen=True)
class ParticipantRecord:
    """The facts about a participant that survive a restart of the server.

    Attributes:
        participant: the participant.
        session_id: the newest session that it was given.
        durable_round: the first round that it would need again after a restart.
        finished: whether it has finished.
        worker_id: the id of the newest session's worker; 0 if it sent none.
    """

    participant: str
    session_id: int
    durable_round: int
    finished: bool
    worker_id: int = 0


@dataclass(frozen=True)
class Restored:
    """The content of a run's journal; a new machine starts from it.

    Attributes:
        oldest: the oldest closed round that is kept; equal to `frontier` where none is.
        frontier: the first round that is not closed.
        participants: the newest record of each participant.
    """

    oldest: int = 0
    frontier: int = 0
    participants: tuple[ParticipantRecord, ...] = ()


@dataclass(frozen=True)
class Join:
    """A worker asks for a session.

    Attributes:
        participant: the worker's participant.
        first_round: the first round that the worker needs.
        worker_id: the worker's id, which distinguishes workers of one participant; 0 if it sent none.
        session_id: the session that this worker had last; 0 for none.
    """

    participant: str
    first_round: int
    worker_id: int = 0
    session_id: int = 0


@dataclass(frozen=True)
class Contribute:
    """A contribution arrived on a session."""

    session_id: int
    contribution: Contribution


@dataclass(frozen=True)
class Decided:
    """The targets of a round are made and journalled."""

    round: int


@dataclass(frozen=True)
class Progress:
    """A participant reports the first round that it would need again after a restart."""

    session_id: int
    durable_round: int


@dataclass(frozen=True)
class Leave:
    """A participant leaves."""

    session_id: int
    reason: LeaveReason


@dataclass(frozen=True)
class Disconnect:
    """A session's stream broke, or was ended because of what was sent on it.

    Attributes:
        session_id: the session.
        lost: whether to stop waiting for the participant, as what it sends cannot be used.
    """

    session_id: int
    lost: bool = False


@dataclass(frozen=True)
class Tick:
    """Time went by."""


Event = Join | Contribute | Decided | Progress | Leave | Disconnect | Tick
