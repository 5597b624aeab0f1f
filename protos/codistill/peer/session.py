"""A peer's session with the server, as a pure state machine: `(state, event, now) -> step`.

There are no threads, clock, sockets or sleeps in here; time and jitter are arguments. A driver

1. sets a goal: :meth:`Session.join`, :meth:`Session.receive`, :meth:`Session.reconnect` or :meth:`Session.leave`;
2. asks for the next :meth:`Session.step` and carries it out;
3. reports the event that came of it, and continues with 2, until the step is `Done` or the targets arrived.

What ends the peer is raised, with its exit code. gRPC drives these decisions, and so does a simulation with its own clock.

The state has three parts. The *link* is connected, abandoned (open, to be cancelled) or disconnected. The *goal* has one
deadline, which a server that is away does not move. The *pauses* keep attempts apart.

A server that let this peer join is an aggregation server. A later status that denies it comes from damage on the way,
unless it comes again and again. What was sent on a stream that stays silent counts as lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from codistill.peer.errors import PeerError
from codistill.peer.steps import CALL_SECONDS, Cancel, Done, Failure, Join, Leave, Listen, Pause, Send, Step
from codistill.process.exit_codes import ExitCode

__all__ = ["Session"]

_SHORTEST_CALL = 0.1
_SHORTEST_LISTEN = 0.2
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 5.0
_DAMAGE_LIMIT = 5
# Answers of a server that does not know this service.
_UNKNOWN_SERVICE = ("UNKNOWN", "UNIMPLEMENTED", "INTERNAL")


# The link


@dataclass(frozen=True)
class _Disconnected:
    """There is no stream.

    Attributes:
        new_channel: whether the next Join needs another channel.
    """

    new_channel: bool = False


@dataclass(frozen=True)
class _Connected:
    """The stream is open, as far as is known."""


@dataclass(frozen=True)
class _Abandoned:
    """The stream is of no use any more and has to be cancelled.

    Attributes:
        why: what is wrong with a stream that is still open; empty if it is over.
        new_channel: whether the Join after it needs another channel.
    """

    why: str = ""
    new_channel: bool = False


# The goal


@dataclass(frozen=True)
class _Goal:
    """A goal and its times. By itself, it is a session whose stream is open.

    Attributes:
        since: when the goal was set.
        until: its deadline.
        away_since: since when the server is away, if it is.
    """

    since: float
    until: float
    away_since: float


@dataclass(frozen=True)
class _Receive(_Goal):
    """The targets of a round.

    Attributes:
        round_number: the round.
        heard_at: when the stream last brought a message, or last got the contribution.
        waiting_for: the participants that the server waits for.
    """

    round_number: int
    heard_at: float
    waiting_for: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Leave(_Goal):
    """The end of the session.

    Attributes:
        finished: whether the participant trained all its steps, so that the server must acknowledge this.
    """

    finished: bool


# Pauses and the open contribution


@dataclass(frozen=True)
class _Pauses:
    """Seconds between attempts.

    Attributes:
        due: the pause before the next step.
        after_break: the next pause after a broken stream. The first such attempt is made at once.
        after_failed_join: the next pause after a failed Join.
    """

    due: float = 0.0
    after_break: float = 0.0
    after_failed_join: float = _FIRST_PAUSE

    def broke(self, remaining: float) -> _Pauses:
        """Return the pauses after a stream broke; a server may accept joins and break every stream."""
        longer = max(2 * self.after_break, _FIRST_PAUSE)
        return replace(self, due=min(self.after_break, remaining), after_break=longer)

    def join_failed(self, remaining: float) -> _Pauses:
        """Return the pauses after a Join failed."""
        return replace(self, due=min(self.after_failed_join, remaining), after_failed_join=2 * self.after_failed_join)


@dataclass(frozen=True)
class _Open:
    """A contribution without targets yet.

    Attributes:
        round_number: its round.
        sent: whether it is on the present stream.
    """

    round_number: int
    sent: bool


class Session:
    """The state machine; the module's text says how to drive it.

    Args:
        address: the server's, for messages.
        connect_timeout: seconds to reach a server never reached before.
        give_up_after: seconds for one round's targets, or for a server that went away.
        silence_after: seconds without a message after which a stream is abandoned although it is open. It must exceed the
            time between the server's notices.

    Attributes:
        session_id: the id of the last session; 0 before the first.
    """

    def __init__(self, address: str, connect_timeout: float, give_up_after: float, silence_after: float) -> None:
        self.session_id = 0
        self._address = address
        self._connect_timeout = connect_timeout
        self._give_up_after = give_up_after
        self._silence_after = silence_after
        self._link: _Disconnected | _Connected | _Abandoned = _Disconnected()
        self._goal: _Goal | None = None
        self._pauses = _Pauses()
        self._next_round: int | None = None
        self._open: _Open | None = None
        self._damage_in_a_row = 0

    @property
    def connected(self) -> bool:
        """Whether the session has a stream, as far as is known."""
        return not isinstance(self._link, _Disconnected)

    # Goals

    def join(self, first_round: int, now: float) -> None:
        """Aim at a session that starts with a round; the steps end with `Done`."""
        self._next_round = first_round
        self._aim(_Goal(now, now + self._connect_timeout, now))

    def send(self, round_number: int) -> bool:
        """Record that a round's contribution is open.

        Returns:
            Whether to put it on the stream at once; otherwise a `Send` step follows.
        """
        self._open = _Open(round_number, sent=self.connected)
        return self._open.sent

    def receive(self, round_number: int, now: float) -> None:
        """Aim at the targets of a round; :meth:`targets` returns whether they arrived."""
        self._aim(_Receive(now, now + self._give_up_after, now, round_number, heard_at=now))

    def reconnect(self, now: float) -> None:
        """Aim at a new session in place of one whose stream is over, unless the way it ended forbids joining again."""
        self._aim(_Goal(now, now + self._give_up_after, now))
        if isinstance(self._link, _Connected):
            self._link = _Abandoned()

    def leave(self, now: float, *, finished: bool, active: bool) -> None:
        """Aim at the end of the session.

        The others wait for a participant until the server knows that it finished, so a broken connection is restored for that.
        For any other reason the end of the connection tells the server enough.

        Args:
            now: the time.
            finished: whether the participant trained all its steps.
            active: whether the transport's stream is still open.
        """
        self._aim(_Leave(now, now + self._give_up_after, now, finished))
        if self.connected:
            self._link = _Connected() if active else _Abandoned()

    def _aim(self, goal: _Goal) -> None:
        self._goal = goal
        self._pauses = _Pauses()

    def overdue(self, now: float) -> bool:
        """Return whether the deadline is over, so that one more failure is the last."""
        return self._goal is not None and now >= self._goal.until

    # The next step

    def step(self, now: float, jitter: float) -> Step:
        """Return what to do next.

        Args:
            now: the time, in seconds of a clock that never goes back.
            jitter: a draw from 0 to 1, so that peers that lost the same server come back at different times.

        Raises:
            RuntimeError: :meth:`join` was never called.
        """
        goal = self._goal
        if goal is None:
            return Done()
        if isinstance(goal, _Leave) and not goal.finished and not isinstance(self._link, _Connected):
            return Done()
        if self._pauses.due > 0:
            seconds = min(self._pauses.due, _LONGEST_PAUSE)
            self._pauses = replace(self._pauses, due=0.0)
            return Pause(seconds * (0.5 + jitter))
        match self._link:
            case _Abandoned(why):
                return Cancel(why)
            case _Disconnected(new_channel):
                return self._step_to_join(goal.until - now, new_channel)
            case _Connected():
                return self._step_on_stream(goal, now)

    def _step_to_join(self, remaining: float, new_channel: bool) -> Step:
        if self._next_round is None:
            raise RuntimeError("send and receive come after join")
        self._link = _Disconnected()  # one other channel is enough
        timeout = max(min(remaining, CALL_SECONDS), _SHORTEST_CALL)
        return Join(self._next_round, self.session_id, timeout, remaining, new_channel)

    def _step_on_stream(self, goal: _Goal, now: float) -> Step:
        if self._open is not None and not self._open.sent:
            self._open = replace(self._open, sent=True)
            self._hear(now)
            return Send(self._open.round_number)
        match goal:
            case _Receive():
                deadline = min(goal.until, goal.heard_at + self._silence_after)
                return Listen(max(deadline - now, _SHORTEST_LISTEN))
            case _Leave():
                return Leave()
            case _:
                return Done()

    # Events

    def reached(self, round_number: int) -> None:
        """Record that all rounds before this one are trained, so that no join asks for them."""
        if self._next_round is not None:
            self._next_round = max(self._next_round, round_number)

    def moved(self, address: str) -> None:
        """Record that the server has another address."""
        self._address = address

    def joined(self, session_id: int) -> None:
        """Record that Join succeeded and its stream is open. An open contribution is sent on it again."""
        self.session_id = session_id
        self._link = _Connected()
        self._pauses = replace(self._pauses, after_failed_join=_FIRST_PAUSE)
        if self._open is not None:
            self._open = replace(self._open, sent=False)

    def join_failed(self, failure: Failure, now: float) -> None:
        """Record that Join failed.

        Raises:
            PeerError: the server refused, has a newer worker, or was away for too long.
        """
        _check_superseded(failure)
        self._check_refused(failure)
        remaining = self._check_reachable(failure, now)
        # gRPC's channel looks up a name that led nowhere again after up to two minutes only, which no option shortens.
        self._link = _Disconnected(new_channel=not failure.pushback)
        self._pauses = self._pauses.join_failed(remaining)

    def targets(self, round_number: int, now: float) -> bool:
        """Record that the targets of a round arrived.

        Returns:
            Whether they are those that are waited for. Others answer a contribution that was sent twice, around a reconnection.

        Raises:
            PeerError: they are not, and the wait is over.
        """
        self._damage_in_a_row = 0
        if isinstance(self._goal, _Receive) and self._goal.round_number == round_number:
            self._goal = self._open = None
            self.reached(round_number + 1)
            return True
        self._hear(now)
        self.silence(now)
        return False

    def waiting(self, round_number: int, participants: Sequence[str], now: float) -> None:
        """Record which participants the server waits for; this does not extend the deadline.

        Raises:
            PeerError: the wait is over.
        """
        self._damage_in_a_row = 0
        self._hear(now)
        if isinstance(self._goal, _Receive) and self._goal.round_number == round_number:
            self._goal = replace(self._goal, waiting_for=tuple(participants))
        self.silence(now)

    def silence(self, now: float) -> None:
        """Record that the stream brought nothing of use; abandon it if it was silent for too long.

        Raises:
            PeerError: the wait is over.
        """
        if not isinstance(self._goal, _Receive):
            return
        if now >= self._goal.until:
            raise self._gave_up(self._goal, now)
        silent = now - self._goal.heard_at
        if self.connected and now >= self._goal.heard_at + self._silence_after:
            why = f"nothing was heard of round {self._goal.round_number} for {silent:.0f} s"
            self._link = _Abandoned(why, new_channel=True)

    def broke(self, failure: Failure, now: float) -> None:
        """Record that the stream ended.

        Raises:
            PeerError: joining again would not help, or the wait is over.
        """
        new_channel = not isinstance(self._link, _Connected) and self._link.new_channel
        self._link = _Disconnected(new_channel or failure.damaged or failure.may_be_damage)
        if self._goal is not None:
            self._goal = replace(self._goal, away_since=now)
        _check_superseded(failure)
        self._check_refused(failure, "ABORTED", "CANCELLED")
        if isinstance(self._goal, _Receive):
            self.silence(now)
            self._pauses = self._pauses.broke(self._goal.until - now)

    def report_answered(self) -> None:
        """Record that the server answered a report: all that a session without rounds ever receives."""
        self._damage_in_a_row = 0

    def left(self) -> None:
        """Record that Leave was acknowledged."""
        self._goal = None

    def leave_failed(self, failure: Failure, now: float) -> None:
        """Record that Leave failed. That of a participant that finished is repeated in a new session.

        Raises:
            PeerError: the participant finished, and the server refused or was away for too long.
        """
        if not (isinstance(self._goal, _Leave) and self._goal.finished):
            self._goal = None
            return
        self._check_refused(failure, "ABORTED")
        self._check_reachable(failure, now)
        self._pauses = replace(self._pauses, due=_FIRST_PAUSE)
        self._link = _Abandoned(new_channel=failure.may_be_damage or failure.code == "DEADLINE_EXCEEDED")

    def _hear(self, now: float) -> None:
        if isinstance(self._goal, _Receive):
            self._goal = replace(self._goal, heard_at=now)

    # What ends the peer

    def _check_refused(self, failure: Failure, *passing: str) -> None:
        """Raise the error of a failure that will not pass.

        Args:
            failure: the failure; those that may come from damage are counted.
            passing: status codes that pass, besides the temporary ones.
        """
        if failure.temporary or failure.code in passing:
            return
        if self.session_id and failure.may_be_damage:
            self._damage_in_a_row += 1
            if self._damage_in_a_row < _DAMAGE_LIMIT:
                return
        raise self._refused(failure)

    def _check_reachable(self, failure: Failure, now: float) -> float:
        """Return the seconds until the deadline, or raise the error of a server that stayed away until then."""
        assert self._goal is not None  # noqa: S101 - without a goal there is no step that can fail
        if now < self._goal.until:
            return self._goal.until - now
        what = "went away and did not come back" if self.session_id else "cannot be reached"
        seconds = round(self._goal.until - self._goal.away_since, 1)
        why = "; ".join(filter(None, (failure.details, failure.advice)))
        raise PeerError(f"server {self._address} {what} within {seconds:g} s: {why}", ExitCode.UNREACHABLE)

    def _refused(self, failure: Failure) -> PeerError:
        if failure.code in _UNKNOWN_SERVICE:
            return PeerError(
                f"server {self._address} does not answer as an aggregation server ({failure.code}: {failure.details}); "
                "check the address and that both sides have the same version",
                failure.exit_code,
            )
        return PeerError(f"server {self._address} refused: {failure.details}", failure.exit_code)

    def _gave_up(self, goal: _Receive, now: float) -> PeerError:
        waiting_for = ", ".join(goal.waiting_for) or "the server"
        return PeerError(
            f"gave up after {now - goal.since:.0f} s: round {goal.round_number} still waits for {waiting_for}; see why it is "
            "away, then resume the run (exchange.give_up_after sets this limit)",
            ExitCode.GAVE_UP,
        )


def _check_superseded(failure: Failure) -> None:
    if failure.superseded:
        raise PeerError(failure.details, failure.exit_code)
