"""The actions that the rounds of a run ask for: the output of :mod:`codistill_server.rounds.machine`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from codistill_server.rounds.events import Contribution, StudentRecord

__all__ = [
    "Absent",
    "Action",
    "Admit",
    "Answer",
    "Complete",
    "Decide",
    "End",
    "Forget",
    "Notify",
    "Refuse",
    "Remember",
    "Returned",
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
    """The students that an open round waits for.

    Attributes:
        round: the round.
        students: their names, in the experiment's order.
        seconds: the time since the round's first contribution.
    """

    round: int
    students: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Admit:
    """Answer a join with the worker's new session."""

    student: str
    session: int
    frontier: int


@dataclass(frozen=True)
class Refuse:
    """Reject the event; its session, if there is one, stays as it is."""

    status: Status
    message: str


@dataclass(frozen=True)
class End:
    """End a session's stream with a status. The machine has forgotten the session already."""

    session: int
    student: str
    status: Status
    message: str


@dataclass(frozen=True)
class Decide:
    """Make and journal the targets of a round, then report :class:`codistill_server.rounds.events.Decided`.

    Attributes:
        round: the round.
        contributions: by student, in the experiment's order; absent students may be missing.
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

    session: int
    student: str
    contribution: Contribution


@dataclass(frozen=True)
class Notify:
    """Send a session the names of the students that it waits for."""

    session: int
    waiting: Waiting


@dataclass(frozen=True)
class Absent:
    """Note that the frontier no longer waits for a student."""

    student: str
    round: int
    reason: str


@dataclass(frozen=True)
class Returned:
    """Note that the frontier waits for a student again."""

    student: str
    round: int


@dataclass(frozen=True)
class Remember:
    """Write a student's record to the journal."""

    record: StudentRecord


@dataclass(frozen=True)
class Forget:
    """Drop the closed rounds before this one: nobody needs them any more."""

    before: int


@dataclass(frozen=True)
class Complete:
    """Note that every student has finished."""


Action = Admit | Refuse | End | Decide | Answer | Notify | Absent | Returned | Remember | Forget | Complete
