"""The actions that the rounds of a run ask for: the output of :mod:`codistill_server.rounds.machine`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from codistill_server.rounds.events import Contribution, ParticipantRecord

__all__ = [
    "Action",
    "Admit",
    "Answer",
    "Awaited",
    "Complete",
    "Decide",
    "End",
    "Forget",
    "Notify",
    "Refuse",
    "Remember",
    "Skipped",
    "Status",
    "Waiting",
]


class Status(Enum):
    """Why a message or a session is rejected; the service gives each its gRPC status code."""

    ABORTED = "aborted"
    """The session is over; join again."""
    SUPERSEDED = "superseded"
    """The session is over, as a newer worker replaced this one; do not join again."""
    FAILED_PRECONDITION = "failed precondition"
    """The configuration differs; do not retry."""
    INVALID_ARGUMENT = "invalid argument"
    """The message is wrong."""


@dataclass(frozen=True)
class Waiting:
    """The participants that an open round waits for.

    Attributes:
        round: the round.
        participants: their names, in the experiment's order.
        seconds: the time since the round's first contribution.
    """

    round: int
    participants: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Admit:
    """Answer a join with the worker's new session."""

    participant: str
    session_id: int
    frontier: int


@dataclass(frozen=True)
class Refuse:
    """Reject the event; its session, if there is one, stays as it is."""

    status: Status
    message: str


@dataclass(frozen=True)
class End:
    """End a session's stream with a status. The machine has forgotten the session already."""

    session_id: int
    participant: str
    status: Status
    message: str


@dataclass(frozen=True)
class Decide:
    """Make and journal the targets of a round, then report :class:`codistill_server.rounds.events.Decided`.

    Attributes:
        round: the round.
        contributions: by participant, in the experiment's order; skipped participants may be missing.
        arrived: when each contribution arrived, in seconds of the caller's clock.
        targets: whether the round is given targets; below the quorum it is not.
    """

    round: int
    contributions: Mapping[str, Contribution]
    arrived: Mapping[str, float]
    targets: bool = True


@dataclass(frozen=True)
class Answer:
    """Send a session the targets of a closed round, in answer to its contribution."""

    session_id: int
    participant: str
    contribution: Contribution


@dataclass(frozen=True)
class Notify:
    """Send a session the names of the participants that it waits for."""

    session_id: int
    waiting: Waiting


@dataclass(frozen=True)
class Skipped:
    """Note that the frontier no longer waits for a participant."""

    participant: str
    round: int
    reason: str


@dataclass(frozen=True)
class Awaited:
    """Note that the frontier waits for a participant again."""

    participant: str
    round: int


@dataclass(frozen=True)
class Remember:
    """Write a participant's record to the journal."""

    record: ParticipantRecord


@dataclass(frozen=True)
class Forget:
    """Drop the closed rounds before this one: nobody needs them any more."""

    before: int


@dataclass(frozen=True)
class Complete:
    """Note that every participant has finished."""


Action = Admit | Refuse | End | Decide | Answer | Notify | Skipped | Awaited | Remember | Forget | Complete
