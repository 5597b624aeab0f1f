"""The steps that a session asks of its driver, and how a call or a stream that it made may have failed."""

from __future__ import annotations

from dataclasses import dataclass

from codistill.process.exit_codes import ExitCode

__all__ = [
    "CALL_SECONDS",
    "Cancel",
    "Done",
    "Failure",
    "Join",
    "Leave",
    "Listen",
    "Pause",
    "Send",
    "Step",
]

CALL_SECONDS = 20.0
"""Seconds that one call may take."""

_TEMPORARY = ("UNAVAILABLE", "DEADLINE_EXCEEDED")
# What a server, or gRPC itself, makes of bytes that it cannot understand.
_MAY_BE_DAMAGE = ("UNKNOWN", "UNIMPLEMENTED", "INTERNAL", "RESOURCE_EXHAUSTED", "UNAUTHENTICATED")


@dataclass(frozen=True)
class Failure:
    """How a call or a stream ended.

    Attributes:
        code: the name of its gRPC status code.
        details: its text, on one line.
        superseded: whether a newer worker has taken the participant over.
        pushback: whether the server says after how long to try again.
        damaged: whether the bytes that arrived differ from those that the server sent.
        advice: what to do about a server that stays away.
    """

    code: str
    details: str
    superseded: bool = False
    pushback: bool = False
    damaged: bool = False
    advice: str = "check that `codistill serve` runs there"

    @property
    def temporary(self) -> bool:
        """Whether to try the same again."""
        return self.code in _TEMPORARY or self.pushback

    @property
    def may_be_damage(self) -> bool:
        """Whether bytes damaged on the way to or from a codistill server can cause it."""
        return self.code in _MAY_BE_DAMAGE and not self.pushback

    @property
    def exit_code(self) -> ExitCode:
        """How the peer's process ends if this failure ends it; the same for every transport."""
        if self.superseded:
            return ExitCode.SUPERSEDED
        diverged = self.code == "INVALID_ARGUMENT" and "diverged" in self.details
        return ExitCode.DIVERGED if diverged else ExitCode.REFUSED


@dataclass(frozen=True)
class Join:
    """Call Join and open the session's stream, then report ``joined`` or ``join_failed``.

    Attributes:
        first_round: the first round that the participant needs.
        session_id: the session that it had last; 0 for none.
        timeout: seconds that the call may take.
        remaining: seconds until the server is given up; negative once that time is over.
        new_channel: whether to open another channel first. The present one may lose what is sent on it, or not look for
            the server again for minutes.
    """

    first_round: int
    session_id: int
    timeout: float
    remaining: float
    new_channel: bool = False


@dataclass(frozen=True)
class Send:
    """Put the open contribution, that of this round, on the stream."""

    round_number: int


@dataclass(frozen=True)
class Listen:
    """Wait for one message of the stream, then report ``targets``, ``waiting``, ``broke`` or ``silence``.

    Attributes:
        seconds: how long to wait.
    """

    seconds: float


@dataclass(frozen=True)
class Pause:
    """Do nothing for some seconds."""

    seconds: float


@dataclass(frozen=True)
class Cancel:
    """Cancel the stream, drop its unread messages, and report ``broke`` with how it ended.

    Attributes:
        why: what is wrong with a stream that is still open; empty if it is over.
    """

    why: str = ""


@dataclass(frozen=True)
class Leave:
    """Deliver the reports that are left and call Leave, then report ``left`` or ``leave_failed``."""


@dataclass(frozen=True)
class Done:
    """Stop: the goal is reached."""


Step = Join | Send | Listen | Pause | Cancel | Leave | Done
