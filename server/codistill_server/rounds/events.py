"""What happens to the rounds of a run, and what is to be done about it: the words of :mod:`codistill_server.rounds.machine`.

An event goes in, actions come out. Both are plain values; what a contribution carries is opaque here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

__all__ = [
    "Absent",
    "Action",
    "Admit",
    "Answer",
    "Complete",
    "Contribute",
    "Contribution",
    "Decide",
    "Decided",
    "Disconnect",
    "End",
    "Event",
    "Forget",
    "Join",
    "Leave",
    "LeaveReason",
    "Notify",
    "Presence",
    "Progress",
    "Refuse",
    "Remember",
    "Restored",
    "Returned",
    "Samples",
    "Status",
    "StudentRecord",
    "Tick",
    "Waiting",
]


class Status(Enum):
    """Why a message or a session is turned away; the service gives each its gRPC status code."""

    ABORTED = "aborted"
    """The session is over; join again."""
    SUPERSEDED = "superseded"
    """The session is over and a newer worker has taken the student over; do not join again."""
    FAILED_PRECONDITION = "failed precondition"
    """The configuration differs; do not retry."""
    INVALID_ARGUMENT = "invalid argument"
    """The message is wrong."""


class Presence(Enum):
    """Where a student stands."""

    EXPECTED = "expected"
    PRESENT = "present"
    ABSENT = "absent"
    FINISHED = "finished"
    FAILED = "failed"


class LeaveReason(Enum):
    """Why a student leaves."""

    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True)
class Samples:
    """Which samples a contribution is about: ids and labels, each little-endian int64."""

    ids: bytes
    labels: bytes

    def difference(self, theirs: Samples) -> str:
        """Returns where two sets of samples differ first, this one being the round's."""
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
    """What a student published in a round; `payload` is opaque here."""

    round: int
    samples: Samples
    held_out: Samples | None = None
    payload: Any = None


# Events


@dataclass(frozen=True)
class Join:
    """A worker wants a session for `student`; it will ask for rounds from `first_round` on.

    Attributes:
        student: the student.
        first_round: the first round that the worker needs.
        worker: what tells this worker from another one of the student; 0 where nothing does.
        session: the session that this worker had last; 0 for none.
    """

    student: str
    first_round: int
    worker: int = 0
    session: int = 0


@dataclass(frozen=True)
class Contribute:
    """A contribution came in on a session."""

    session: int
    contribution: Contribution


@dataclass(frozen=True)
class Decided:
    """The targets of a round are made and journalled."""

    round: int


@dataclass(frozen=True)
class Progress:
    """A student reports the first round that it would need again after a restart."""

    session: int
    durable_round: int


@dataclass(frozen=True)
class Leave:
    """A student says goodbye."""

    session: int
    reason: LeaveReason


@dataclass(frozen=True)
class Disconnect:
    """A session's stream broke, or was ended because of what was sent on it.

    Attributes:
        session: the session.
        lost: whether the student is not to be waited for: what it sends is of no use.
    """

    session: int
    lost: bool = False


@dataclass(frozen=True)
class Tick:
    """Time went by."""


Event = Join | Contribute | Decided | Progress | Leave | Disconnect | Tick


# Actions


@dataclass(frozen=True)
class Admit:
    """The worker that asked is in."""

    student: str
    session: int
    frontier: int


@dataclass(frozen=True)
class Refuse:
    """The event is turned away; the session, if there is one, stays as it is."""

    status: Status
    message: str


@dataclass(frozen=True)
class End:
    """End a session's stream with a status. The core has forgotten the session already."""

    session: int
    student: str
    status: Status
    message: str


@dataclass(frozen=True)
class Decide:
    """Make and journal the targets of a round, then say :class:`Decided`.

    Attributes:
        round: the round.
        contributions: by student, in the experiment's order; of all students, or of those that are not absent.
        arrived: when each contribution came in, in the caller's time.
        targets: whether the round is given targets; below the quorum it is not.
    """

    round: int
    contributions: Mapping[str, Contribution]
    arrived: Mapping[str, float]
    targets: bool = True


@dataclass(frozen=True)
class Answer:
    """Send a session the targets of a closed round. `contribution` is what it asked with."""

    session: int
    student: str
    contribution: Contribution


@dataclass(frozen=True)
class Waiting:
    """Whom an open round waits for, and for how long it has."""

    round: int
    students: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Notify:
    """Tell a session whom it waits for."""

    session: int
    waiting: Waiting


@dataclass(frozen=True)
class Absent:
    """The frontier no longer waits for a student."""

    student: str
    round: int
    reason: str


@dataclass(frozen=True)
class Returned:
    """The frontier waits for a student again."""

    student: str
    round: int


@dataclass(frozen=True)
class StudentRecord:
    """What must be remembered of a student over a restart of the server."""

    student: str
    session: int
    durable_round: int
    finished: bool
    worker: int = 0


@dataclass(frozen=True)
class Remember:
    """Write a student's record to the journal."""

    record: StudentRecord


@dataclass(frozen=True)
class Forget:
    """Closed rounds before this one are needed by nobody."""

    before: int


@dataclass(frozen=True)
class Complete:
    """Every student has finished."""


Action = Admit | Refuse | End | Decide | Answer | Notify | Absent | Returned | Remember | Forget | Complete


@dataclass(frozen=True)
class Restored:
    """What a journal knows of a run.

    Attributes:
        oldest: the oldest closed round that is kept; equal to `frontier` where none is.
        frontier: the first round that is not closed.
        students: what was remembered of each student.
    """

    oldest: int = 0
    frontier: int = 0
    students: tuple[StudentRecord, ...] = ()
