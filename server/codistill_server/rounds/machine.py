"""The rounds of one run as a pure state machine: `(state, event, now) -> actions`.

There are no threads, clock, sockets or disk in here. Time is an argument, and the outside world is a list of actions that
the caller carries out. So the gRPC service, the in-process loop, and tests that crash, duplicate and reorder everything
drive the same code.

The life of a round. Every awaited participant's contribution arrives (:class:`Contribute`), and the machine asks for
:class:`Decide`. The caller makes the targets, **writes them to the journal**, and only then reports :class:`Decided`. The
machine then answers every session that waits (:class:`Answer`). From then on the round never changes: a later or repeated
contribution to it is answered again from the journal. So a duplicate, a retry and the replay of a participant that came back
from its checkpoint are one and the same thing.

Every participant is awaited. With a :class:`codistill_server.rounds.stragglers.StragglerPolicy`, those that missed a
round's deadline or left are not. Such a skipped participant learns the rounds that it missed from the journal, at its own
speed. It is awaited again once it is at the frontier and quick enough to keep up.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum

from codistill_server.rounds.actions import (
    Action,
    Admit,
    Answer,
    Awaited,
    Complete,
    Decide,
    End,
    Forget,
    Notify,
    Refuse,
    Remember,
    Skipped,
    Status,
    Waiting,
)
from codistill_server.rounds.events import (
    Contribute,
    Contribution,
    Decided,
    Disconnect,
    Event,
    Join,
    Leave,
    LeaveReason,
    ParticipantRecord,
    Progress,
    Restored,
    Tick,
)
from codistill_server.rounds.stragglers import ArrivalLags, CloseDecision, StragglerPolicy, close_decision

__all__ = ["ParticipantState", "Rounds", "Rules"]


class ParticipantState(Enum):
    """Where a participant stands."""

    EXPECTED = "expected"
    CONNECTED = "connected"
    DISCONNECTED = "disconnected"
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(frozen=True)
class Rules:
    """The part of an experiment that the rounds depend on.

    Attributes:
        participants: the expected participants' names, in the experiment's order.
        exchanges: whether the method exchanges anything; if not, there are no rounds to close here.
        waiting_notice: seconds between two notices to a participant that waits.
        keep_all: never forget a closed round.
        stragglers: when a round closes without a participant; None waits for every participant.
        steps_per_round: training steps from one round to the next.
    """

    participants: tuple[str, ...]
    exchanges: bool = True
    waiting_notice: float = 5.0
    keep_all: bool = False
    stragglers: StragglerPolicy | None = None
    steps_per_round: int = 1


@dataclass
class _OpenRound:
    """The round at the frontier.

    Attributes:
        contributions: by participant.
        arrived: by participant, when its contribution arrived.
        waiters: by session, the contribution that is to be answered.
        opened_at: when the first contribution arrived; None before.
        deciding: whether the targets are being made.
        notified: by session, when it contributed or was last notified that it waits.
    """

    contributions: dict[str, Contribution] = field(default_factory=dict[str, Contribution])
    arrived: dict[str, float] = field(default_factory=dict[str, float])
    waiters: dict[int, Contribution] = field(default_factory=dict[int, Contribution])
    opened_at: float | None = None
    deciding: bool = False
    notified: dict[int, float] = field(default_factory=dict[int, float])


class Rounds:
    """The state machine; the module's docstring says how it is driven.

    Its memory is bounded by the number of participants: it holds the open round's contributions only.

    Args:
        rules: the rules of the run.
        restored: what the run's journal holds; None for a new run.
    """

    def __init__(self, rules: Rules, restored: Restored | None = None) -> None:
        restored = restored or Restored()
        records = {record.participant: record for record in restored.participants}
        self.rules = rules
        self._frontier = restored.frontier
        self._oldest = restored.oldest
        self._open_round = _OpenRound()
        self._sessions: dict[int, str] = {}
        self._session_of: dict[str, int] = {}
        self._newest_session = max((record.session_id for record in restored.participants), default=0)
        self._last_sessions = dict.fromkeys(rules.participants, 0)
        self._workers = dict.fromkeys(rules.participants, 0)
        self._durable_rounds = dict.fromkeys(rules.participants, 0)
        self._states = dict.fromkeys(rules.participants, ParticipantState.EXPECTED)
        for participant in rules.participants:
            if participant in records:
                record = records[participant]
                self._last_sessions[participant] = record.session_id
                self._workers[participant] = record.worker_id
                self._durable_rounds[participant] = record.durable_round
                self._states[participant] = ParticipantState.FINISHED if record.finished else ParticipantState.EXPECTED
        self._awaited = set(rules.participants)
        self._lags = ArrivalLags()
        self._heard_at: dict[int, float] = {}  # by session: when it joined, or last contributed
        self._answered_at: dict[int, float] = {}  # by session

    @property
    def frontier(self) -> int:
        """The first round that is not closed."""
        return self._frontier

    @property
    def oldest(self) -> int:
        """The oldest closed round that can still be answered; equal to `frontier` where there is none."""
        return self._oldest

    @property
    def states(self) -> Mapping[str, ParticipantState]:
        """Where each participant stands."""
        return self._states

    @property
    def durable_rounds(self) -> Mapping[str, int]:
        """The first round that each participant would need again after a restart."""
        return self._durable_rounds

    @property
    def awaited(self) -> Collection[str]:
        """The participants that the frontier waits for."""
        return self._awaited

    @property
    def complete(self) -> bool:
        """Whether every participant has finished."""
        return all(state is ParticipantState.FINISHED for state in self._states.values())

    def participant_of(self, session_id: int) -> str | None:
        """Return the participant of a session, or None if the session is over or never was."""
        return self._sessions.get(session_id)

    def waiting(self, now: float) -> Waiting | None:
        """Return the participants that the open round waits for; None before its first contribution and while it is decided."""
        if self._open_round.opened_at is None or self._open_round.deciding:
            return None
        missing = tuple(
            participant
            for participant in self.rules.participants
            if participant in self._awaited and participant not in self._open_round.contributions
        )
        return Waiting(self._frontier, missing, max(0.0, now - self._open_round.opened_at))

    def apply(self, event: Event, now: float) -> list[Action]:
        """Apply one event and return the actions that it asks for, in the order in which to carry them out.

        Args:
            event: the event.
            now: the time of the event, in seconds of a clock that never goes back.

        Raises:
            ValueError: a round is reported as decided that is not being decided.
        """
        match event:
            case Join():
                return self._join(event, now)
            case Contribute():
                return self._contribute(event, now)
            case Decided():
                return self._decided(event, now)
            case Progress():
                return self._progress(event)
            case Leave():
                return self._leave(event, now)
            case Disconnect():
                return self._disconnect(event, now)
            case Tick():
                return [*self._evictions(now), *self._close_if_due(now), *self._notices(now)]

    def _join(self, event: Join, now: float) -> list[Action]:
        participant = event.participant
        if participant not in self._states:
            return [
                Refuse(
                    Status.FAILED_PRECONDITION,
                    f"participant {participant!r} is not one of this run's; allowed: {', '.join(self.rules.participants)}",
                )
            ]
        holder = self._workers[participant]
        taken_over = f"a newer worker of participant {participant!r} has joined; this one must not go on"
        if event.session_id and 0 != holder != event.worker_id:
            return [Refuse(Status.SUPERSEDED, taken_over)]
        if self.rules.exchanges and event.first_round > self._frontier:
            return [
                Refuse(
                    Status.FAILED_PRECONDITION,
                    f"first_round: participant {participant!r} resumes at round {event.first_round}, but this server's journal ends at "
                    f"round {self._frontier}: start the server with the --run-dir of the run's whole journal; if its end is "
                    "lost (a power cut: see exchange.journal.durability), remove the participant's checkpoint.safetensors, so "
                    "that it resumes from the one before it",
                )
            ]
        if self.rules.exchanges and event.first_round < self._oldest:
            return [
                Refuse(
                    Status.FAILED_PRECONDITION,
                    f"first_round: participant {participant!r} needs round {event.first_round}, but the journal keeps rounds from "
                    f"{self._oldest} on: start it with the --run-dir that holds its newest checkpoint, or run with "
                    "exchange.journal.keep: all",
                )
            ]
        actions: list[Action] = []
        older_session_id = self._session_of.get(participant)
        if older_session_id is not None:
            self._forget_session(older_session_id, ParticipantState.DISCONNECTED)
            if holder and holder == event.worker_id:  # its own: an answer was lost, or an earlier call came late
                joined_again = f"the worker of participant {participant!r} has joined again; join again"
                actions.append(End(older_session_id, participant, Status.ABORTED, joined_again))
            else:
                actions.append(End(older_session_id, participant, Status.SUPERSEDED, taken_over))
        self._workers[participant] = event.worker_id
        self._newest_session += 1
        session_id = self._newest_session
        self._sessions[session_id] = participant
        self._session_of[participant] = session_id
        self._last_sessions[participant] = session_id
        # A worker whose newest checkpoint was torn resumes an older one than it had reported; it needs those rounds.
        self._durable_rounds[participant] = min(self._durable_rounds[participant], event.first_round)
        self._states[participant] = ParticipantState.CONNECTED
        self._heard_at[session_id] = now
        return [*actions, Remember(self._record(participant)), Admit(participant, session_id, self._frontier)]

    def _contribute(self, event: Contribute, now: float) -> list[Action]:
        session_id, contribution = event.session_id, event.contribution
        participant = self._sessions.get(session_id)
        if participant is None:
            return [_session_is_over(session_id)]
        if not self.rules.exchanges:
            message = "this run's method exchanges nothing; a contribution is not allowed"
            return self._end(session_id, Status.FAILED_PRECONDITION, message)
        if contribution.round > self._frontier:
            message = (
                f"round {contribution.round} is not open; expected round {self._frontier}, or one before it; join again"
            )
            return self._end(session_id, Status.ABORTED, message)
        if contribution.round < self._oldest:
            message = (
                f"round {contribution.round} is not kept any more; the journal keeps rounds from {self._oldest} on"
            )
            return self._reject(session_id, message, now)
        if contribution.round < self._frontier:
            returned = self._await_again(participant, contribution.round, session_id, now)
            self._heard_at[session_id] = self._answered_at[session_id] = now
            return [*returned, Answer(session_id, participant, contribution)]
        opened = self._open_round
        mismatch = self._mismatch(participant, contribution)
        if mismatch is not None:
            others = opened.contributions.keys() - {participant}
            if opened.deciding or any(self._session_of.get(other) in opened.waiters for other in others):
                return self._reject(session_id, mismatch, now)
            # The participants that sent the others are gone. Kept, these would reject even them when they come back put right.
            opened.contributions.clear()
            opened.arrived.clear()
            opened.opened_at = None
        returned = self._await_again(participant, contribution.round, session_id, now)
        self._heard_at[session_id] = now
        opened.waiters[session_id] = contribution
        opened.notified[session_id] = now
        if opened.deciding:
            return returned
        # A participant that died and came back sends again; this takes the place of its earlier contribution.
        opened.contributions[participant] = contribution
        opened.arrived[participant] = now
        opened.opened_at = now if opened.opened_at is None else opened.opened_at
        return [*returned, *self._close_if_due(now)]

    def _await_again(self, participant: str, round_number: int, session_id: int, now: float) -> list[Action]:
        """Await a skipped participant again if it has caught up and each of its last steps fits into a round's deadline.

        A slower participant may still contribute in time. Were it awaited, every round would wait its whole deadline for it.
        """
        policy = self.rules.stragglers
        if policy is None or participant in self._awaited or round_number < self._frontier - 1:
            return []
        elapsed = now - self._answered_at.get(session_id, self._heard_at[session_id])
        if elapsed / self.rules.steps_per_round > self._lags.deadline(policy):
            return []
        self._awaited.add(participant)
        return [Awaited(participant, self._frontier)]

    def _close_if_due(self, now: float) -> list[Action]:
        """Close the open round if it waits for no participant any more."""
        opened = self._open_round
        if opened.opened_at is None or opened.deciding:
            return []
        decision = self._close_decision(now - opened.opened_at)
        self._awaited.difference_update(decision.skipped)
        actions: list[Action] = [
            Skipped(participant, self._frontier, decision.reason) for participant in decision.skipped
        ]
        if not decision.close:
            return actions
        opened.deciding = True
        in_order = {
            participant: opened.contributions[participant]
            for participant in self.rules.participants
            if participant in opened.contributions
        }
        return [*actions, Decide(self._frontier, in_order, dict(opened.arrived), decision.targets)]

    def _close_decision(self, waited: float) -> CloseDecision:
        contributed, policy = self._open_round.contributions, self.rules.stragglers
        if policy is None:
            return CloseDecision(len(contributed) == len(self.rules.participants), True, (), "every participant is in")
        return close_decision(
            policy,
            waited=waited,
            deadline=self._lags.deadline(policy),
            awaited=[participant for participant in self.rules.participants if participant in self._awaited],
            expected=[name for name, state in self._states.items() if state is ParticipantState.EXPECTED],
            contributed=contributed,
        )

    def _mismatch(self, participant: str, contribution: Contribution) -> str | None:
        """Describe how a contribution contradicts the open round's; None where it does not."""
        opened = self._open_round
        # Once a round is being decided, even its only contributor cannot change what it sent.
        peer = next(
            (other for other in opened.contributions if other != participant), participant if opened.deciding else None
        )
        return None if peer is None else _describe_mismatch(participant, contribution, peer, opened.contributions[peer])

    def _decided(self, event: Decided, now: float) -> list[Action]:
        if event.round != self._frontier or not self._open_round.deciding:
            raise ValueError(f"round {event.round} is decided, but round {self._frontier} is the open one")
        waiters, arrived = self._open_round.waiters, self._open_round.arrived.values()
        if len(arrived) > 1:
            self._lags.add(max(arrived) - min(arrived))
        self._answered_at |= dict.fromkeys(waiters, now)
        self._frontier += 1
        self._open_round = _OpenRound()
        return [
            Answer(session_id, self._sessions[session_id], contribution) for session_id, contribution in waiters.items()
        ]

    def _progress(self, event: Progress) -> list[Action]:
        participant = self._sessions.get(event.session_id)
        if participant is None:
            return [_session_is_over(event.session_id)]
        durable = min(event.durable_round, self._frontier) if self.rules.exchanges else event.durable_round
        if durable <= self._durable_rounds[participant]:
            return []
        self._durable_rounds[participant] = durable
        return [Remember(self._record(participant)), *self._forget_rounds()]

    def _leave(self, event: Leave, now: float) -> list[Action]:
        participant = self._sessions.get(event.session_id)
        if participant is None:
            return [_session_is_over(event.session_id)]
        state = {
            LeaveReason.FINISHED: ParticipantState.FINISHED,
            LeaveReason.STOPPED: ParticipantState.DISCONNECTED,
            LeaveReason.FAILED: ParticipantState.FAILED,
        }[event.reason]
        self._forget_session(event.session_id, state)
        if state is not ParticipantState.FINISHED:
            return self._stop_awaiting(participant, f"participant {participant!r} {event.reason.value}", now)
        self._durable_rounds[participant] = max(self._durable_rounds[participant], self._frontier)
        actions: list[Action] = [Remember(self._record(participant)), *self._forget_rounds()]
        return [*actions, Complete()] if self.complete else actions

    def _disconnect(self, event: Disconnect, now: float) -> list[Action]:
        participant = self._sessions.get(event.session_id)
        self._forget_session(event.session_id, ParticipantState.DISCONNECTED)
        if participant is None or not event.lost:
            return []
        return self._stop_awaiting(participant, _unusable(participant), now)

    def _reject(self, session_id: int, message: str, now: float) -> list[Action]:
        """End a session because of what was sent on it: its participant would send the same again."""
        participant = self._sessions[session_id]
        ended = self._end(session_id, Status.FAILED_PRECONDITION, message)
        return [*ended, *self._stop_awaiting(participant, _unusable(participant), now)]

    def _stop_awaiting(self, participant: str, reason: str, now: float) -> list[Action]:
        """Stop waiting for a participant that will send nothing, if a policy allows rounds to close without one."""
        if self.rules.stragglers is None or not self.rules.exchanges or participant not in self._awaited:
            return []
        self._awaited.discard(participant)
        return [Skipped(participant, self._frontier, reason), *self._close_if_due(now)]

    def _evictions(self, now: float) -> list[Action]:
        """End the sessions of skipped participants that have been silent for too long."""
        policy = self.rules.stragglers
        if policy is None or not self.rules.exchanges:
            return []
        actions: list[Action] = []
        for participant, session_id in list(self._session_of.items()):
            silent = now - self._heard_at[session_id]
            if (
                participant not in self._awaited
                and silent >= policy.evict_after
                and session_id not in self._open_round.waiters
            ):
                message = f"nothing came from participant {participant!r} for {silent:.0f} s and rounds went on without it; join again"
                actions += self._end(session_id, Status.ABORTED, message)
        return actions

    def _forget_rounds(self) -> list[Action]:
        if self.rules.keep_all or not self.rules.exchanges:
            return []
        needed = min(*self._durable_rounds.values(), self._frontier)
        if needed <= self._oldest:
            return []
        self._oldest = needed
        return [Forget(needed)]

    def _notices(self, now: float) -> list[Action]:
        waiting = self.waiting(now)
        if waiting is None:
            return []
        actions: list[Action] = []
        for session_id in self._open_round.waiters:
            if now - self._open_round.notified[session_id] >= self.rules.waiting_notice:
                self._open_round.notified[session_id] = now
                actions.append(Notify(session_id, waiting))
        return actions

    def _end(self, session_id: int, status: Status, message: str) -> list[Action]:
        participant = self._sessions[session_id]
        self._forget_session(session_id, ParticipantState.DISCONNECTED)
        return [End(session_id, participant, status, message)]

    def _forget_session(self, session_id: int, state: ParticipantState) -> None:
        participant = self._sessions.pop(session_id, None)
        self._open_round.waiters.pop(session_id, None)
        self._open_round.notified.pop(session_id, None)
        self._heard_at.pop(session_id, None)
        self._answered_at.pop(session_id, None)
        if participant is not None:
            del self._session_of[participant]
            self._states[participant] = state

    def _record(self, participant: str) -> ParticipantRecord:
        finished = self._states[participant] is ParticipantState.FINISHED
        return ParticipantRecord(
            participant,
            self._last_sessions[participant],
            self._durable_rounds[participant],
            finished,
            self._workers[participant],
        )


def _describe_mismatch(participant: str, contribution: Contribution, peer: str, theirs: Contribution) -> str | None:
    """Describe how a participant's contribution contradicts a peer's to the same round; None where it does not."""
    round_number = contribution.round
    if theirs.samples != contribution.samples:
        return (
            f"round {round_number}: participant {participant!r} has {theirs.samples.difference(contribution.samples)}, "
            f"from participant {peer!r}: seed, data and batch size must be the same for all"
        )
    if theirs.held_out == contribution.held_out:
        return None
    if theirs.held_out is None or contribution.held_out is None:
        ours, others = ("no", "some") if contribution.held_out is None else ("some", "no")
        return (
            f"round {round_number}: participant {participant!r} sent {ours} held-out samples, "
            f"participant {peer!r} sent {others}: data.held_out must be the same for all"
        )
    return (
        f"round {round_number}: participant {participant!r} has held out "
        f"{theirs.held_out.difference(contribution.held_out)}, from participant {peer!r}: "
        "data.held_out and data.split_seed must be the same for all"
    )


def _session_is_over(session_id: int) -> Refuse:
    return Refuse(Status.ABORTED, f"session {session_id} is over or unknown to this server; join again")


def _unusable(participant: str) -> str:
    return f"what participant {participant!r} sends is of no use"
