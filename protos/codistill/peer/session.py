"""What a worker does next about its session, as a pure state machine: `(state, event, now) -> step`.

There are no threads, clock, sockets or sleeping in here; time and jitter are arguments. Whoever drives it says what is
wanted (:meth:`Session.join`, :meth:`Session.receive` …), then asks for one step after the other, carries it out, and
tells what came of it, until the step is :class:`Done` or the targets are there. What ends the worker is raised, with its
exit code. So the same decisions are driven by gRPC, and by a simulation with a clock of its own.

Everything that is wanted has one deadline, and a server that is away in the meantime does not move it.

A server that let this worker join is an aggregation server. So a status that denies it, later on, comes from damage on the
way, if it does not come again and again; and what was sent on a stream that says nothing is taken to be lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from codistill.peer.errors import PeerError
from codistill.process.exit_codes import ExitCode

__all__ = ["CALL_SECONDS", "Done", "Failure", "Goodbye", "HangUp", "Join", "Listen", "Pause", "Send", "Session", "Step"]

CALL_SECONDS = 20.0
"""Seconds that one call may take."""

_SHORTEST_CALL = 0.1
_SHORTEST_LISTEN = 0.2
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 5.0
_TEMPORARY = ("UNAVAILABLE", "DEADLINE_EXCEEDED")
# What a server, or gRPC itself, makes of bytes that it cannot understand.
_STRANGE = ("UNKNOWN", "UNIMPLEMENTED", "INTERNAL", "RESOURCE_EXHAUSTED", "UNAUTHENTICATED")
_STRANGE_ENDINGS = 5
_NAMELESS = ("UNKNOWN", "UNIMPLEMENTED", "INTERNAL")


@dataclass(frozen=True)
class Failure:
    """How a call or a stream ended.

    Attributes:
        code: the name of its gRPC status code.
        details: its text, on one line.
        superseded: whether it says that a newer worker has taken the student over.
        pushback: whether it says after how long to come back.
        damaged: whether what came is not what the server sent.
        advice: what a person is to do about a server that stays away.
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
    def strange(self) -> bool:
        """Whether it may come from damage on the way, if the server is one of ours."""
        return self.code in _STRANGE and not self.pushback


# Steps


@dataclass(frozen=True)
class Join:
    """Call Join and open the session's stream, then say :meth:`Session.joined` or :meth:`Session.join_failed`.

    Attributes:
        first_round: the first round that the worker needs now.
        session: the session that it had last; 0 for none.
        timeout: seconds that the call may take.
        left: seconds until the server is given up.
        renew: whether to open another connection for it: the one that there is may lose what is sent on it, or not look
            for the server again for long.
    """

    first_round: int
    session: int
    timeout: float
    left: float
    renew: bool = False


@dataclass(frozen=True)
class Send:
    """Put the open contribution, that of this round, on the stream."""

    round: int


@dataclass(frozen=True)
class Listen:
    """Wait so long for one message of the stream, then say what came, or :meth:`Session.silence`."""

    seconds: float


@dataclass(frozen=True)
class Pause:
    """Do nothing for so long."""

    seconds: float


@dataclass(frozen=True)
class HangUp:
    """Cancel the stream, pass over what was not read, and say :meth:`Session.broke` with how it had ended.

    Attributes:
        why: what is wrong with a stream that stands; empty if it is over.
    """

    why: str = ""


@dataclass(frozen=True)
class Goodbye:
    """Deliver what is left to report, call Leave, then say :meth:`Session.left` or :meth:`Session.goodbye_failed`."""


@dataclass(frozen=True)
class Done:
    """What was wanted is done."""


Step = Join | Send | Listen | Pause | HangUp | Goodbye | Done


class _Goal(Enum):
    NOTHING = auto()
    JOIN = auto()
    RECEIVE = auto()
    MEND = auto()
    LEAVE = auto()


class Session:
    """The state machine; see the module's text for how it is used.

    Args:
        address: the server's, for messages.
        connect_timeout: seconds to reach a server never reached before.
        give_up_after: seconds for one round's targets, or for a server that went away.
        silence_after: seconds without targets or a notice after which a stream is taken to have lost what was sent on it,
            although it stands; longer than the time between the server's notices.

    Attributes:
        number: the session that Join opened last; 0 before.
        standing: whether its stream stands, as far as is known.
    """

    def __init__(self, address: str, connect_timeout: float, give_up_after: float, silence_after: float) -> None:
        self.number = 0
        self.standing = False
        self._address = address
        self._connect_timeout = connect_timeout
        self._give_up_after = give_up_after
        self._silence_after = silence_after
        self._asked = False
        self._goal = _Goal.NOTHING
        self._started = self._until = 0.0
        self._awaited = 0
        self._finished = False
        self._missing: tuple[str, ...] = ()
        self._next_round = 0
        self._open: int | None = None
        self._unsent = False
        self._hang_up = False
        self._silent = ""
        self._heard = 0.0
        self._renew = False
        self._strange = 0
        self._away_since = 0.0
        self._pause = 0.0
        self._pause_after_break = 0.0
        self._pause_after_join = _FIRST_PAUSE

    # What the worker wants

    def join(self, first_round: int, now: float) -> None:
        """Wants a session, from a round on; the steps end with :class:`Done`."""
        self._asked = True
        self._next_round = first_round
        self._want(_Goal.JOIN, self._connect_timeout, now)

    def send(self, number: int) -> bool:
        """Takes in that a round's contribution is open.

        Returns:
            Whether to put it on the stream at once; if not, :class:`Send` says when.
        """
        self._open = number
        self._unsent = not self.standing
        return self.standing

    def receive(self, number: int, now: float) -> None:
        """Wants the targets of a round; :meth:`targets` tells when they are there."""
        self._awaited = number
        self._heard = now
        self._missing = ()
        self._want(_Goal.RECEIVE, self._give_up_after, now)

    def mend(self, now: float) -> None:
        """Wants a new session in the place of one whose stream is over, unless how it ended forbids that."""
        self._want(_Goal.MEND, self._give_up_after, now)
        self._hang_up = self.standing

    def leave(self, now: float, *, finished: bool, active: bool) -> None:
        """Wants to say goodbye.

        The others wait for a student until the server knows that it finished, so a broken connection is mended for that.
        For any other reason the end of the connection tells the server enough.

        Args:
            now: the time.
            finished: whether the student trained all its rounds.
            active: whether the stream still stands, as the transport has it.
        """
        self._finished = finished
        self._want(_Goal.LEAVE, self._give_up_after, now)
        self._hang_up = self.standing and not active

    def reached(self, number: int) -> None:
        """Takes in that the rounds before this one are trained; a join asks for none of them any more."""
        self._next_round = max(self._next_round, number)

    def overdue(self, now: float) -> bool:
        """Returns whether the time for what is wanted is over, so that one more failure is the last."""
        return now >= self._until

    # What to do

    def step(self, now: float, jitter: float) -> Step:
        """Returns what to do next.

        Args:
            now: the time, in seconds of a clock that never goes back.
            jitter: a draw from 0 to 1; others that lost the same server come back at other times.
        """
        if self._goal is _Goal.LEAVE and not self._finished and (self._hang_up or not self.standing):
            return Done()
        if self._pause > 0:
            seconds, self._pause = min(self._pause, _LONGEST_PAUSE), 0.0
            return Pause(seconds * (0.5 + jitter))
        if self._hang_up:
            return HangUp(self._silent)
        if not self.standing:
            if not self._asked:
                raise RuntimeError("send and receive come after join")
            left = self._until - now
            renew, self._renew = self._renew, False
            return Join(self._next_round, self.number, max(min(left, CALL_SECONDS), _SHORTEST_CALL), left, renew)
        if self._unsent and self._open is not None:
            self._unsent = False
            self._heard = now
            return Send(self._open)
        match self._goal:
            case _Goal.RECEIVE:
                return Listen(max(min(self._until, self._heard + self._silence_after) - now, _SHORTEST_LISTEN))
            case _Goal.LEAVE:
                return Goodbye()
            case _:
                return Done()

    # What happened

    def joined(self, number: int) -> None:
        """Takes in that a session is open and its stream stands; what is open goes out again."""
        self.number = number
        self.standing = True
        self._pause_after_join = _FIRST_PAUSE
        self._unsent = self._open is not None

    def join_failed(self, failure: Failure, now: float) -> None:
        """Takes in that Join failed.

        Raises:
            PeerError: the server refused, has a newer worker, or was away for too long.
        """
        if failure.superseded:
            raise PeerError(failure.details, ExitCode.SUPERSEDED)
        if not failure.temporary and not self._may_be_damage(failure):
            raise self._refused(failure)
        if now >= self._until:
            raise self._unreachable(failure)
        # gRPC's channel looks up a name that led nowhere again after up to two minutes only, which no option shortens.
        self._renew = not failure.pushback
        self._pause = min(self._pause_after_join, self._until - now)
        self._pause_after_join *= 2

    def targets(self, number: int, now: float) -> bool:
        """Takes in the targets of a round.

        Returns:
            Whether they are those waited for; others answer a contribution that was sent twice, around a reconnection.

        Raises:
            PeerError: they are not, and the wait is over.
        """
        self._heard, self._strange = now, 0
        if self._goal is not _Goal.RECEIVE or number != self._awaited:
            self.silence(now)
            return False
        self._goal = _Goal.NOTHING
        self._open, self._unsent = None, False
        self.reached(number + 1)
        return True

    def waiting(self, number: int, students: Sequence[str], now: float) -> None:
        """Takes in that the server waits for some students; it says whom, and gives no more time.

        Raises:
            PeerError: the wait is over.
        """
        self._heard, self._strange = now, 0
        if number == self._awaited:
            self._missing = tuple(students)
        self.silence(now)

    def silence(self, now: float) -> None:
        """Takes in that the stream brought nothing of use; one that was silent for too long is left.

        Raises:
            PeerError: the wait is over.
        """
        if self._goal is not _Goal.RECEIVE:
            return
        if now >= self._until:
            raise self._gave_up(now)
        if self.standing and now >= self._heard + self._silence_after:
            self._hang_up = self._renew = True
            self._silent = f"nothing was heard of round {self._awaited} for {now - self._heard:.0f} s"

    def broke(self, failure: Failure, now: float) -> None:
        """Takes in that the stream ended.

        Raises:
            PeerError: joining again would not help, or the wait is over.
        """
        self.standing = self._hang_up = False
        self._silent = ""
        self._away_since = now
        if failure.superseded:
            raise PeerError(failure.details, ExitCode.SUPERSEDED)
        passing = failure.temporary or failure.code in ("ABORTED", "CANCELLED")
        if not passing and not self._may_be_damage(failure):
            raise self._refused(failure)
        self._renew |= failure.damaged or failure.strange
        if self._goal is _Goal.RECEIVE:
            self.silence(now)
            # The first time at once; but a server that takes joins and breaks every stream needs a pause.
            self._pause = min(self._pause_after_break, self._until - now)
            self._pause_after_break = max(2 * self._pause_after_break, _FIRST_PAUSE)

    def answered(self) -> None:
        """Takes in that the server answered a report; a session that exchanges nothing hears of it in no other way."""
        self._strange = 0

    def left(self) -> None:
        """Takes in that the server knows."""
        self._goal = _Goal.NOTHING

    def goodbye_failed(self, failure: Failure, now: float) -> None:
        """Takes in that the goodbye failed; one that matters is said again, in a new session.

        Raises:
            PeerError: it matters, and the server refused or was away for too long.
        """
        if not self._finished:
            self._goal = _Goal.NOTHING
            return
        passing = failure.temporary or failure.code == "ABORTED"
        if not passing and not self._may_be_damage(failure):
            raise self._refused(failure)
        if now >= self._until:
            raise self._unreachable(failure)
        self._pause = _FIRST_PAUSE
        self._hang_up = True
        self._renew |= failure.strange or failure.code == "DEADLINE_EXCEEDED"

    def _may_be_damage(self, failure: Failure) -> bool:
        """Returns whether a failure may come from damage on the way, and counts it."""
        if not self.number or not failure.strange:
            return False
        self._strange += 1
        return self._strange < _STRANGE_ENDINGS

    def _want(self, goal: _Goal, seconds: float, now: float) -> None:
        self._goal = goal
        self._started, self._until = now, now + seconds
        self._away_since = now
        self._pause = self._pause_after_break = 0.0
        self._pause_after_join = _FIRST_PAUSE

    def moved(self, address: str) -> None:
        """Takes in that the server has another address."""
        self._address = address

    # What ends the worker

    def _unreachable(self, failure: Failure) -> PeerError:
        what = "went away and did not come back" if self.number else "cannot be reached"
        seconds = round(self._until - self._away_since, 1)
        why = "; ".join(filter(None, (failure.details, failure.advice)))
        return PeerError(f"server {self._address} {what} within {seconds:g} s: {why}", ExitCode.UNREACHABLE)

    def _refused(self, failure: Failure) -> PeerError:
        if failure.code in _NAMELESS:
            return PeerError(
                f"server {self._address} does not answer as an aggregation server ({failure.code}: {failure.details}); "
                "check the address and that both sides have the same version",
                ExitCode.REFUSED,
            )
        diverged = failure.code == "INVALID_ARGUMENT" and "diverged" in failure.details
        return PeerError(
            f"server {self._address} refused: {failure.details}", ExitCode.DIVERGED if diverged else ExitCode.REFUSED
        )

    def _gave_up(self, now: float) -> PeerError:
        who = ", ".join(self._missing) or "the server"
        return PeerError(
            f"gave up after {now - self._started:.0f} s: round {self._awaited} still waits for {who}; see why it is away, "
            "then resume the run (exchange.give_up_after sets this limit)",
            ExitCode.GAVE_UP,
        )
