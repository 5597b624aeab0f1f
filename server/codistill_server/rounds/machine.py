"""The rounds of one run as a pure state machine: `(state, event, now) -> actions`.

There are no threads, clock, sockets or disk in here; time is an argument and the outside world is a list of actions
for somebody else to carry out. So the same code is driven by the gRPC service, by the in-process loop, and by tests
that crash, duplicate and reorder everything.

The life of a round: every awaited student's contribution comes in (:class:`Contribute`), the machine says
:class:`Decide`; whoever drives it makes the targets, **writes them to the journal**, and only then says
:class:`Decided`; the machine answers everyone who waits (:class:`Answer`). From then on the round never changes: any
contribution to it, however late or repeated, is answered again from the journal. So a duplicate, a retry and the
replay of a student that came back from its checkpoint are one and the same thing.

Who is awaited: every student; or, with :class:`codistill_server.rounds.stragglers.StragglerPolicy` rules, every student but those that
missed a round's deadline or said goodbye. An absent student learns the rounds that it missed from the journal, at its
own speed, and is awaited again once it is at the frontier and quick enough to keep up.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from codistill_server.rounds.events import (
    Absent,
    Action,
    Admit,
    Answer,
    Complete,
    Contribute,
    Contribution,
    Decide,
    Decided,
    Disconnect,
    End,
    Event,
    Forget,
    Join,
    Leave,
    LeaveReason,
    Notify,
    Presence,
    Progress,
    Refuse,
    Remember,
    Restored,
    Returned,
    Status,
    StudentRecord,
    Tick,
    Waiting,
)
from codistill_server.rounds.stragglers import ArrivalLags, Decision, StragglerPolicy, decide

__all__ = ["Rounds", "Rules"]


@dataclass(frozen=True)
class Rules:
    """What of an experiment the rounds depend on.

    Attributes:
        students: the expected students' names, in the experiment's order.
        exchanges: whether the method exchanges anything; if not, there are no rounds to close here.
        waiting_notice: seconds between two notices to a student that waits.
        keep_all: never forget a closed round.
        absence: when a round goes on without a student; None waits for every student.
        steps: training steps from one round here to the next, where not every step exchanges something.
    """

    students: tuple[str, ...]
    exchanges: bool = True
    waiting_notice: float = 5.0
    keep_all: bool = False
    absence: StragglerPolicy | None = None
    steps: int = 1


@dataclass
class _Open:
    """The open round."""

    contributions: dict[str, Contribution] = field(default_factory=dict[str, Contribution])
    arrived: dict[str, float] = field(default_factory=dict[str, float])
    waiters: dict[int, Contribution] = field(default_factory=dict[int, Contribution])
    opened: float | None = None
    deciding: bool = False
    notified: dict[int, float] = field(default_factory=dict[int, float])


class Rounds:
    """The state machine; see the module's text for how it is used.

    Its memory is bounded by the number of students: only the open round's contributions are held.
    """

    def __init__(self, rules: Rules, restored: Restored | None = None) -> None:
        restored = restored or Restored()
        known = {record.student: record for record in restored.students}
        self.rules = rules
        self._frontier = restored.frontier
        self._oldest = restored.oldest
        self._open = _Open()
        self._sessions: dict[int, str] = {}
        self._current: dict[str, int] = {}
        self._last_session = max((record.session for record in restored.students), default=0)
        self._last_sessions = {name: known[name].session if name in known else 0 for name in rules.students}
        self._workers = {name: known[name].worker if name in known else 0 for name in rules.students}
        self._durable = {name: known[name].durable_round if name in known else 0 for name in rules.students}
        self._presence = {
            name: Presence.FINISHED if name in known and known[name].finished else Presence.EXPECTED
            for name in rules.students
        }
        self._awaited = set(rules.students)
        self._arrivals = ArrivalLags()
        self._heard: dict[int, float] = {}
        self._answered: dict[int, float] = {}

    @property
    def frontier(self) -> int:
        """The first round that is not closed."""
        return self._frontier

    @property
    def oldest(self) -> int:
        """The oldest closed round that can still be answered; equal to `frontier` where there is none."""
        return self._oldest

    @property
    def presence(self) -> Mapping[str, Presence]:
        """Where each student stands."""
        return self._presence

    @property
    def durable(self) -> Mapping[str, int]:
        """The first round that each student would need again after a restart."""
        return self._durable

    @property
    def awaited(self) -> Collection[str]:
        """The students that the frontier waits for."""
        return self._awaited

    @property
    def complete(self) -> bool:
        """Whether every student has finished."""
        return all(presence is Presence.FINISHED for presence in self._presence.values())

    def student_of(self, session: int) -> str | None:
        """Returns whose session this is, or None if it is over or never was."""
        return self._sessions.get(session)

    def waiting(self, now: float) -> Waiting | None:
        """Returns whom the open round waits for, or None while no contribution to it is in, or all are."""
        if self._open.opened is None or self._open.deciding:
            return None
        missing = tuple(
            name for name in self.rules.students if name in self._awaited and name not in self._open.contributions
        )
        return Waiting(self._frontier, missing, max(0.0, now - self._open.opened))

    def apply(self, event: Event, now: float) -> list[Action]:
        """Takes in one event and returns what must be done, in order.

        Args:
            event: what happened.
            now: the time it happened, in seconds of a clock that never goes back.
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
                return [*self._evictions(now), *self._settle(now), *self._notices(now)]

    def _join(self, event: Join, now: float) -> list[Action]:
        student = event.student
        if student not in self._presence:
            return [
                Refuse(
                    Status.FAILED_PRECONDITION,
                    f"student {student!r} is not one of this run's; allowed: {', '.join(self.rules.students)}",
                )
            ]
        holder = self._workers[student]
        taken_over = f"a newer worker of student {student!r} has joined; this one must not go on"
        if event.session and 0 != holder != event.worker:
            return [Refuse(Status.SUPERSEDED, taken_over)]
        if self.rules.exchanges and event.first_round > self._frontier:
            return [
                Refuse(
                    Status.FAILED_PRECONDITION,
                    f"student {student!r} resumes at round {event.first_round}, but this server's journal ends at "
                    f"round {self._frontier}: start the server with the --run-dir of the run's whole journal; if its end is "
                    "lost (a power cut: see exchange.journal.durability), remove the student's checkpoint.safetensors, so "
                    "that it goes on from the one before it",
                )
            ]
        if self.rules.exchanges and event.first_round < self._oldest:
            return [
                Refuse(
                    Status.FAILED_PRECONDITION,
                    f"student {student!r} needs round {event.first_round}, but the journal keeps rounds from "
                    f"{self._oldest} on: start it with the --run-dir that holds its newest checkpoint, or run with "
                    "exchange.journal.keep: all",
                )
            ]
        actions: list[Action] = []
        older = self._current.get(student)
        if older is not None:
            self._drop(older, Presence.ABSENT)
            if holder and holder == event.worker:  # its own: an answer was lost, or a call of before came late
                again = f"the worker of student {student!r} has joined again; join again"
                actions.append(End(older, student, Status.ABORTED, again))
            else:
                actions.append(End(older, student, Status.SUPERSEDED, taken_over))
        self._workers[student] = event.worker
        self._last_session += 1
        session = self._last_session
        self._sessions[session] = student
        self._current[student] = session
        self._last_sessions[student] = session
        # A worker whose newest checkpoint was torn resumes an older one than it had reported; it needs those rounds.
        self._durable[student] = min(self._durable[student], event.first_round)
        self._presence[student] = Presence.PRESENT
        self._heard[session] = now
        return [*actions, Remember(self._record(student)), Admit(student, session, self._frontier)]

    def _contribute(self, event: Contribute, now: float) -> list[Action]:
        session, contribution = event.session, event.contribution
        student = self._sessions.get(session)
        if student is None:
            return [Refuse(Status.ABORTED, f"session {session} is over or unknown to this server; join again")]
        if not self.rules.exchanges:
            message = "this run's method exchanges nothing; a contribution is not allowed"
            return self._end(session, Status.FAILED_PRECONDITION, message)
        if contribution.round > self._frontier:
            message = (
                f"round {contribution.round} is not open; expected round {self._frontier}, or one before it; join again"
            )
            return self._end(session, Status.ABORTED, message)
        if contribution.round < self._oldest:
            message = (
                f"round {contribution.round} is not kept any more; the journal keeps rounds from {self._oldest} on"
            )
            return self._turn_away(session, message, now)
        if contribution.round < self._frontier:
            back = self._comes_back(student, contribution.round, session, now)
            self._heard[session] = self._answered[session] = now
            return [*back, Answer(session, student, contribution)]
        opened = self._open
        problem = self._mismatch(student, contribution)
        if problem is not None:
            peers = opened.contributions.keys() - {student}
            if opened.deciding or any(self._current.get(peer) in opened.waiters for peer in peers):
                return self._turn_away(session, problem, now)
            # Those who sent it are gone; were it kept, it would turn away even them when they come back put right.
            opened.contributions.clear()
            opened.arrived.clear()
            opened.opened = None
        back = self._comes_back(student, contribution.round, session, now)
        self._heard[session] = now
        opened.waiters[session] = contribution
        opened.notified[session] = now
        if opened.deciding:
            return back
        # A student that died and came back sends again what it has now; it takes the place of what it had then.
        opened.contributions[student] = contribution
        opened.arrived[student] = now
        opened.opened = now if opened.opened is None else opened.opened
        return [*back, *self._settle(now)]

    def _comes_back(self, student: str, number: int, session: int, now: float) -> list[Action]:
        """Awaits an absent student again when it has caught up and its last steps took no longer each than a round waits.

        A slower one may still contribute in time; were it awaited, every round would wait its whole deadline for it.
        """
        absence = self.rules.absence
        if absence is None or student in self._awaited or number < self._frontier - 1:
            return []
        took = now - self._answered.get(session, self._heard[session])
        if took / self.rules.steps > self._arrivals.deadline(absence):
            return []
        self._awaited.add(student)
        return [Returned(student, self._frontier)]

    def _settle(self, now: float) -> list[Action]:
        """Closes the open round if it waits for nobody any more."""
        opened = self._open
        if opened.opened is None or opened.deciding:
            return []
        verdict = self._judge(now, opened.opened)
        self._awaited.difference_update(verdict.absent)
        actions: list[Action] = [Absent(name, self._frontier, verdict.reason) for name in verdict.absent]
        if not verdict.close:
            return actions
        opened.deciding = True
        ordered = {name: opened.contributions[name] for name in self.rules.students if name in opened.contributions}
        decide = Decide(self._frontier, ordered, dict(opened.arrived), verdict.targets)
        return [*actions, decide]

    def _judge(self, now: float, opened: float) -> Decision:
        contributed, absence = self._open.contributions, self.rules.absence
        if absence is None:
            return Decision(len(contributed) == len(self.rules.students), True, (), "every student is in")
        return decide(
            absence,
            waited=now - opened,
            deadline=self._arrivals.deadline(absence),
            awaited=[name for name in self.rules.students if name in self._awaited],
            expected=[name for name, presence in self._presence.items() if presence is Presence.EXPECTED],
            contributed=contributed,
        )

    def _mismatch(self, student: str, contribution: Contribution) -> str | None:
        opened = self._open
        peers = {peer: other for peer, other in opened.contributions.items() if peer != student}
        if not peers and opened.deciding:  # what is being decided cannot be changed by the only one who sent it
            peers = opened.contributions
        for peer, other in peers.items():
            if other.samples != contribution.samples:
                return (
                    f"round {contribution.round}: student {student!r} has {other.samples.difference(contribution.samples)}, "
                    f"from student {peer!r}: seed, data and batch size must be the same for all"
                )
            if (other.held_out is None) != (contribution.held_out is None):
                ours, theirs = ("no", "some") if contribution.held_out is None else ("some", "no")
                return (
                    f"round {contribution.round}: student {student!r} sent {ours} held-out samples, "
                    f"student {peer!r} sent {theirs}: data.held_out must be the same for all"
                )
            if (
                other.held_out is not None
                and contribution.held_out is not None
                and other.held_out != contribution.held_out
            ):
                return (
                    f"round {contribution.round}: student {student!r} has held out "
                    f"{other.held_out.difference(contribution.held_out)}, from student {peer!r}: "
                    "data.held_out and data.split_seed must be the same for all"
                )
            return None
        return None

    def _decided(self, event: Decided, now: float) -> list[Action]:
        if event.round != self._frontier or not self._open.deciding:
            raise ValueError(f"round {event.round} is decided, but round {self._frontier} is the open one")
        waiters, arrived = self._open.waiters, self._open.arrived.values()
        if len(arrived) > 1:
            self._arrivals.add(max(arrived) - min(arrived))
        self._answered |= dict.fromkeys(waiters, now)
        self._frontier += 1
        self._open = _Open()
        return [Answer(session, self._sessions[session], contribution) for session, contribution in waiters.items()]

    def _progress(self, event: Progress) -> list[Action]:
        student = self._sessions.get(event.session)
        if student is None:
            return [Refuse(Status.ABORTED, f"session {event.session} is over or unknown to this server; join again")]
        durable = min(event.durable_round, self._frontier) if self.rules.exchanges else event.durable_round
        if durable <= self._durable[student]:
            return []
        self._durable[student] = durable
        return [Remember(self._record(student)), *self._forget()]

    def _leave(self, event: Leave, now: float) -> list[Action]:
        student = self._sessions.get(event.session)
        if student is None:
            return [Refuse(Status.ABORTED, f"session {event.session} is over or unknown to this server; join again")]
        presence = {
            LeaveReason.FINISHED: Presence.FINISHED,
            LeaveReason.STOPPED: Presence.ABSENT,
            LeaveReason.FAILED: Presence.FAILED,
        }[event.reason]
        self._drop(event.session, presence)
        if presence is not Presence.FINISHED:
            return self._give_up_on(student, f"student {student!r} {event.reason.value}", now)
        self._durable[student] = max(self._durable[student], self._frontier)
        actions: list[Action] = [Remember(self._record(student)), *self._forget()]
        return [*actions, Complete()] if self.complete else actions

    def _disconnect(self, event: Disconnect, now: float) -> list[Action]:
        student = self._sessions.get(event.session)
        self._drop(event.session, Presence.ABSENT)
        if student is None or not event.lost:
            return []
        return self._give_up_on(student, _of_no_use(student), now)

    def _turn_away(self, session: int, message: str, now: float) -> list[Action]:
        """Ends a session because of what was sent on it, which would be sent again."""
        student = self._sessions[session]
        ended = self._end(session, Status.FAILED_PRECONDITION, message)
        return [*ended, *self._give_up_on(student, _of_no_use(student), now)]

    def _give_up_on(self, student: str, reason: str, now: float) -> list[Action]:
        """Stops waiting for a student that will send nothing, where the rules allow to go on without one."""
        if self.rules.absence is None or not self.rules.exchanges or student not in self._awaited:
            return []
        self._awaited.discard(student)
        return [Absent(student, self._frontier, reason), *self._settle(now)]

    def _evictions(self, now: float) -> list[Action]:
        """Ends the sessions of absent students that have been silent for too long."""
        absence = self.rules.absence
        if absence is None or not self.rules.exchanges:
            return []
        actions: list[Action] = []
        for student, session in list(self._current.items()):
            silent = now - self._heard[session]
            if student not in self._awaited and silent >= absence.evict_after and session not in self._open.waiters:
                message = f"nothing came from student {student!r} for {silent:.0f} s and rounds went on without it; join again"
                actions += self._end(session, Status.ABORTED, message)
        return actions

    def _forget(self) -> list[Action]:
        if self.rules.keep_all or not self.rules.exchanges:
            return []
        needed = min(*self._durable.values(), self._frontier)
        if needed <= self._oldest:
            return []
        self._oldest = needed
        return [Forget(needed)]

    def _notices(self, now: float) -> list[Action]:
        waiting = self.waiting(now)
        if waiting is None:
            return []
        actions: list[Action] = []
        for session in self._open.waiters:
            if now - self._open.notified[session] >= self.rules.waiting_notice:
                self._open.notified[session] = now
                actions.append(Notify(session, waiting))
        return actions

    def _end(self, session: int, status: Status, message: str) -> list[Action]:
        student = self._sessions[session]
        self._drop(session, Presence.ABSENT)
        return [End(session, student, status, message)]

    def _drop(self, session: int, presence: Presence) -> None:
        student = self._sessions.pop(session, None)
        self._open.waiters.pop(session, None)
        self._open.notified.pop(session, None)
        self._heard.pop(session, None)
        self._answered.pop(session, None)
        if student is not None:
            del self._current[student]
            self._presence[student] = presence

    def _record(self, student: str) -> StudentRecord:
        finished = self._presence[student] is Presence.FINISHED
        return StudentRecord(
            student, self._last_sessions[student], self._durable[student], finished, self._workers[student]
        )


def _of_no_use(student: str) -> str:
    return f"what student {student!r} sends is of no use"
