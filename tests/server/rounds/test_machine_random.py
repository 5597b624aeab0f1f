"""The rounds' core against a model of everything around it: journal, network, worker processes, faults.

Each rule predicts what the core must do from the model alone, never from the core's own state. A server can be killed
between any two actions; what it had remembered and closed until then is all that its successor has.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from codistill_server.rounds.actions import (
    Action,
    Admit,
    Answer,
    Complete,
    Decide,
    End,
    Forget,
    Notify,
    Refuse,
    Remember,
    Status,
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
    Samples,
    Tick,
)
from codistill_server.rounds.machine import ParticipantState, Rounds, Rules
from server.rounds.support import contribution, machine_settings, samples

TOTAL = 6
NOTICE = 5.0
PARTICIPANTS = st.integers(0, 3)


def wants_held_out(number: int) -> bool:
    return number % 3 == 2


@dataclass
class JournalModel:
    """The disk: what is on it survives every crash."""

    kept: dict[int, Any] = field(default_factory=dict)
    ever: dict[int, Any] = field(default_factory=dict)
    records: dict[str, ParticipantRecord] = field(default_factory=dict)

    def append(self, number: int, targets: Any) -> None:
        assert number not in self.ever, f"round {number} is decided a second time"
        assert number == len(self.ever), f"round {number} is decided before one of those before it"
        self.ever[number] = self.kept[number] = targets

    def forget(self, before: int) -> None:
        newest = max(self.kept, default=before)  # it holds the method's state
        self.kept = {number: targets for number, targets in self.kept.items() if number >= min(before, newest)}

    @property
    def frontier(self) -> int:
        return len(self.ever)

    def restored(self) -> Restored:
        return Restored(min(self.kept, default=self.frontier), self.frontier, tuple(self.records.values()))


@dataclass
class Worker:
    """A participant's training as its newest process knows it, and its checkpoints on disk."""

    next_round: int = 0
    checkpoint: int = 0
    previous: int = 0
    outstanding: bool = False
    learnt: dict[int, Any] = field(default_factory=dict)


@dataclass
class OpenRound:
    """The model's knowledge of the frontier."""

    contributions: dict[str, Contribution] = field(default_factory=dict)
    waiters: dict[int, float] = field(default_factory=dict)
    opened: float | None = None
    decide: Decide | None = None
    written: bool = False


class ServerKilled(Exception):  # noqa: N818 - an event of the model
    """The server is killed between two actions."""


class RoundsMachine(RuleBasedStateMachine):
    """Drives :class:`Rounds` as the coordinator, the disk, the network and the workers would."""

    @initialize(count=st.integers(2, 4), keep_all=st.sampled_from([False, False, True]))
    def start(self, count: int, keep_all: bool) -> None:
        self.names = ("ant", "bee", "cat", "dog")[:count]
        self.rules_of_run = Rules(self.names, waiting_notice=NOTICE, keep_all=keep_all)
        self.journal = JournalModel()
        self.workers = {name: Worker() for name in self.names}
        self.owners: dict[int, str] = {}  # every session that there ever was
        self.now = 0.0
        self.actions_to_live: int | None = None
        self.highest_frontier = 0
        self.payloads = 0
        self.boot()

    # The world around the core

    def boot(self) -> None:
        self.core = Rounds(self.rules_of_run, self.journal.restored())
        self.live: dict[str, int] = {}
        self.inbox: dict[int, list[tuple[int, Any]]] = {}
        self.states = {
            name: ParticipantState.FINISHED
            if name in self.journal.records and self.journal.records[name].finished
            else ParticipantState.EXPECTED
            for name in self.names
        }
        self.open = OpenRound()
        self.floor = self.journal.restored().oldest
        self.actions_to_live = None
        assert self.core.frontier == self.journal.frontier
        assert dict(self.core.states) == self.states

    def reboot(self) -> None:
        for worker in self.workers.values():
            worker.outstanding = False  # its stream broke; it will join and send again
        self.boot()

    def apply(self, event: Event) -> list[Action]:
        """Apply an event and carry out its actions, until the server is killed; return those promised."""
        actions = self.core.apply(event, self.now)
        try:
            for action in actions:
                self.survive_one_action()
                self.carry_out(action)
        except ServerKilled:
            self.reboot()
        return actions

    def survive_one_action(self) -> None:
        if self.actions_to_live is not None:
            self.actions_to_live -= 1
            if self.actions_to_live < 0:
                raise ServerKilled

    def carry_out(self, action: Action) -> None:
        match action:
            case Remember(record):
                self.journal.records[record.participant] = record
            case Admit(participant, session_id, frontier):
                assert session_id > max(self.owners, default=0), "a session's number is used again"
                assert self.journal.records[participant].session_id == session_id, "admitted before it was remembered"
                assert frontier == self.told
                self.owners[session_id] = participant
                self.live[participant] = session_id
                self.inbox[session_id] = []
                self.states[participant] = ParticipantState.CONNECTED
            case End(session_id, participant):
                self.hang_up(session_id, ParticipantState.DISCONNECTED)
                assert self.owners[session_id] == participant
            case Decide():
                self.check_decide(action)
                self.open.decide = action
            case Answer(session_id, participant, contribution):
                number = contribution.round
                assert number < self.journal.frontier, "answered before it was journalled"
                assert number in self.journal.kept, "the targets promised are not kept any more"
                assert self.live[participant] == session_id, "a session that is over is answered"
                self.inbox[session_id].append((number, self.journal.kept[number]))
            case Forget(before):
                assert not self.rules_of_run.keep_all
                for name in self.names:
                    assert self.journal.records[name].durable_round >= before, "forgets before it remembers why"
                self.journal.forget(before)
                self.floor = before
            case Complete():
                assert self.core.complete
                assert all(self.journal.records[name].finished for name in self.names)
            case Notify() | Refuse():
                pass

    def check_decide(self, decide: Decide) -> None:
        assert decide.round == self.told == self.journal.frontier
        assert tuple(decide.contributions) == self.names, "not in the experiment's order"
        assert dict(decide.contributions) == self.open.contributions, "not what was accepted last of each"
        assert set(decide.arrived) == set(self.names)
        assert all(self.open.opened <= time <= self.now for time in decide.arrived.values())  # type: ignore[operator]
        first = decide.contributions[self.names[0]]
        for each in decide.contributions.values():
            assert each.round == decide.round
            assert each.samples == first.samples
            assert each.held_out == first.held_out

    def hang_up(self, session_id: int, state: ParticipantState) -> None:
        """The model's side of a session's end."""
        participant = self.owners[session_id]
        if self.live.get(participant) == session_id:
            del self.live[participant]
            self.inbox.pop(session_id)
            self.states[participant] = state
            self.workers[participant].outstanding = False
        self.open.waiters.pop(session_id, None)

    def name_of(self, index: int) -> str:
        return self.names[index % len(self.names)]

    def contribution(self, number: int, **changes: Any) -> Contribution:
        self.payloads += 1
        held_out = samples([900, 901]) if wants_held_out(number) else None
        return contribution(number, self.payloads, **{"held_out": held_out, **changes})

    @property
    def told(self) -> int:
        """The frontier as the core knows it: a round may be on disk already that it has not been told of."""
        return self.journal.frontier - self.open.written

    def durable(self, name: str) -> int:
        return self.journal.records[name].durable_round if name in self.journal.records else 0

    # What must come of an event

    def join(self, participant: str, first_round: int) -> bool:
        """Join and predict the outcome; return whether the worker is in."""
        older = self.live.get(participant)
        durable = min(self.durable(participant), first_round)
        killed = self.actions_to_live is not None
        allowed = range(self.floor, self.told + 1)
        actions = self.apply(Join(participant, first_round))
        if first_round not in allowed:
            (refusal,) = actions
            assert isinstance(refusal, Refuse)
            assert refusal.status is Status.FAILED_PRECONDITION
            assert f"round {first_round}" in refusal.message
            return False
        *ends, remember, admit = actions
        assert isinstance(remember, Remember)
        assert isinstance(admit, Admit)
        assert remember.record == ParticipantRecord(participant, admit.session_id, durable, finished=False)
        assert [(end.session_id, end.status) for end in ends] == ([] if older is None else [(older, Status.SUPERSEDED)])  # type: ignore[union-attr]
        admitted = self.live.get(participant) == admit.session_id
        assert admitted or killed
        return admitted

    def contribute(self, session_id: int, contribution: Contribution) -> None:
        """Contribute and predict the outcome from the model."""
        participant = self.owners.get(session_id)
        number = contribution.round
        is_live = participant is not None and self.live.get(participant) == session_id
        peers = {name: other for name, other in self.open.contributions.items() if name != participant}
        fits = all(
            (other.samples, other.held_out) == (contribution.samples, contribution.held_out) for other in peers.values()
        )
        told, floor = self.told, self.floor
        stood_for = self.open.decide is not None or any(self.live.get(peer) in self.open.waiters for peer in peers)
        if is_live and number == told and not fits and not stood_for:
            self.open.contributions, self.open.opened, fits = {}, None, True
        if is_live and number == told and fits:
            self.open.waiters[session_id] = self.now
            if self.open.decide is None:
                self.open.contributions[participant] = contribution  # type: ignore[index]
                self.open.opened = self.now if self.open.opened is None else self.open.opened
        full = len(self.open.contributions) == len(self.names) and self.open.decide is None
        actions = self.apply(Contribute(session_id, contribution))
        if not is_live:
            self.expect_refusal(actions, session_id)
        elif number > told:
            self.expect_end(actions, session_id, Status.ABORTED, f"expected round {told},")
        elif number < floor:
            self.expect_end(actions, session_id, Status.FAILED_PRECONDITION, f"keeps rounds from {floor} on")
        elif number < told:
            (answer,) = actions
            assert answer == Answer(session_id, participant, contribution)  # type: ignore[arg-type]
        elif not fits:
            self.expect_end(actions, session_id, Status.FAILED_PRECONDITION, f"participant {participant!r} ")
            assert any(f"participant {peer!r}" in actions[0].message for peer in peers)  # type: ignore[union-attr]
        elif full:
            (decide,) = actions
            assert isinstance(decide, Decide)
        else:
            assert actions == []

    def expect_refusal(self, actions: list[Action], session_id: int) -> None:
        (refusal,) = actions
        assert isinstance(refusal, Refuse)
        assert refusal.status is Status.ABORTED
        assert f"session {session_id} " in refusal.message

    def expect_end(self, actions: list[Action], session_id: int, status: Status, text: str) -> None:
        (end,) = actions
        assert isinstance(end, End)
        assert (end.session_id, end.status) == (session_id, status)
        assert text in end.message

    def write_targets(self) -> None:
        """Make the targets and journal them; the core is not told yet."""
        decide = self.open.decide
        assert decide is not None
        targets = tuple(contribution.payload for contribution in decide.contributions.values())
        self.journal.append(decide.round, targets)
        self.open.written = True

    def tell_decided(self) -> None:
        decide, waiters = self.open.decide, set(self.open.waiters)
        assert decide is not None
        self.open = OpenRound()
        actions = self.apply(Decided(decide.round))
        assert all(isinstance(action, Answer) for action in actions)
        assert sorted(action.session_id for action in actions) == sorted(waiters)  # type: ignore[union-attr]

    def receive(self, name: str) -> None:
        """The worker reads what it was sent."""
        worker, session_id = self.workers[name], self.live[name]
        for number, targets in self.inbox[session_id]:
            assert targets == self.journal.ever[number]
            assert worker.learnt.setdefault(number, targets) == targets, "a replayed step is another step"
            if number == worker.next_round:
                worker.next_round += 1
                worker.outstanding = False
        self.inbox[session_id] = []

    def step(self, name: str) -> None:
        """The next thing that a healthy worker does."""
        worker = self.workers[name]
        if name not in self.live:
            if self.states[name] is ParticipantState.FINISHED:
                return
            assert self.join(name, worker.next_round) or name not in self.live, "a healthy worker is turned away"
            return
        self.receive(name)
        if worker.next_round == TOTAL:
            self.finish(name)
        elif not worker.outstanding:
            worker.outstanding = True
            self.contribute(self.live[name], self.contribution(worker.next_round))

    def sweep(self) -> None:
        """Everything that can go on does, by one step."""
        if self.open.decide is not None and not self.open.written:
            self.write_targets()
        if self.open.written:
            self.tell_decided()
        for name in self.names:
            self.step(name)

    def save(self, name: str, *, reported: bool) -> None:
        worker = self.workers[name]
        if worker.checkpoint != worker.next_round:
            worker.previous, worker.checkpoint = worker.checkpoint, worker.next_round
        if reported:
            session_id = self.live[name]
            expected = self.progressed(name, session_id, worker.checkpoint, finished=False)
            assert self.apply(Progress(session_id, worker.checkpoint)) == expected

    def finish(self, name: str) -> None:
        self.save(name, reported=False)
        session_id = self.live[name]
        self.hang_up(session_id, ParticipantState.FINISHED)
        expected = self.progressed(name, session_id, TOTAL, finished=True)
        if all(state is ParticipantState.FINISHED for state in self.states.values()):
            expected.append(Complete())
        assert self.apply(Leave(session_id, LeaveReason.FINISHED)) == expected

    def progressed(self, name: str, session_id: int, durable: int, *, finished: bool) -> list[Action]:
        """The consequences of a participant's durable round."""
        if durable <= self.durable(name) and not finished:
            return []
        record = ParticipantRecord(name, session_id, max(durable, self.durable(name)), finished)
        needed = min(self.told, record.durable_round, *(self.durable(peer) for peer in self.names if peer != name))
        forgets = not self.rules_of_run.keep_all and needed > self.floor
        return [Remember(record), *([Forget(needed)] if forgets else [])]

    # Rules: a healthy run

    @rule(participant=PARTICIPANTS)
    def worker_steps(self, participant: int) -> None:
        self.step(self.name_of(participant))

    @rule(times=st.integers(1, 4))
    def everyone_steps(self, times: int) -> None:
        for _ in range(times):
            self.sweep()

    @rule(participant=st.none() | PARTICIPANTS, reported=st.booleans())
    def workers_save(self, participant: int | None, reported: bool) -> None:
        for name in self.names if participant is None else [self.name_of(participant)]:
            if name in self.live:
                self.save(name, reported=reported)

    @precondition(lambda self: self.open.decide is not None and not self.open.written)
    @rule()
    def targets_are_journalled(self) -> None:
        self.write_targets()

    @precondition(lambda self: self.open.written)
    @rule()
    def server_answers(self) -> None:
        self.tell_decided()

    @rule(seconds=st.sampled_from([0.0, 0.1, 1.0, 4.9, 5.0, 12.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        expected: list[tuple[int, float]] = []
        if self.open.decide is None:
            expected = [(s, told) for s, told in self.open.waiters.items() if self.now - told >= NOTICE]
        missing = tuple(name for name in self.names if name not in self.open.contributions)
        actions = self.core.apply(Tick(), self.now)
        assert sorted(action.session_id for action in actions) == sorted(session_id for session_id, _ in expected)  # type: ignore[union-attr]
        for action in actions:
            assert isinstance(action, Notify)
            assert action.waiting.round == self.told
            assert action.waiting.participants == missing
            assert action.waiting.seconds == pytest.approx(self.now - self.open.opened)  # type: ignore[operator]
            self.open.waiters[action.session_id] = self.now

    # Rules: faults of workers and of the network

    @rule(participant=PARTICIPANTS, torn=st.booleans())
    def worker_restarts(self, participant: int, torn: bool) -> None:
        """A new process resumes a checkpoint; nobody noticed that the old one is gone."""
        name = self.name_of(participant)
        worker = self.workers[name]
        first_round = worker.previous if torn else worker.checkpoint
        if self.join(name, first_round):
            worker.next_round = worker.checkpoint = first_round
            worker.previous = min(worker.previous, first_round)
            worker.outstanding = False

    @rule(participant=PARTICIPANTS)
    def stream_breaks(self, participant: int) -> None:
        name = self.name_of(participant)
        if name in self.live:
            session_id = self.live[name]
            assert self.apply(Disconnect(session_id)) == []
            self.hang_up(session_id, ParticipantState.DISCONNECTED)

    @rule(participant=PARTICIPANTS, reason=st.sampled_from([LeaveReason.STOPPED, LeaveReason.FAILED]))
    def worker_leaves(self, participant: int, reason: LeaveReason) -> None:
        name = self.name_of(participant)
        if name in self.live:
            session_id = self.live[name]
            assert self.apply(Leave(session_id, reason)) == []
            self.hang_up(
                session_id, ParticipantState.DISCONNECTED if reason is LeaveReason.STOPPED else ParticipantState.FAILED
            )

    @rule(data=st.data())
    def dead_session_speaks(self, data: st.DataObject) -> None:
        """A superseded or cut-off process, or one of a server's previous life, has no effect whatever it says."""
        dead = [*sorted(set(self.owners) - set(self.live.values())), 10**6]
        session_id = data.draw(st.sampled_from(dead))
        number = data.draw(st.integers(0, TOTAL))
        core = self.core
        before = (dict(core.states), dict(core.durable_rounds), core.frontier, core.oldest)
        self.contribute(session_id, self.contribution(number))
        for event in (Progress(session_id, number), *(Leave(session_id, reason) for reason in LeaveReason)):
            self.expect_refusal(self.core.apply(event, self.now), session_id)
        assert self.core.apply(Disconnect(session_id), self.now) == []
        assert before == (dict(core.states), dict(core.durable_rounds), core.frontier, core.oldest)

    @rule(participant=PARTICIPANTS, number=st.none() | st.integers(0, TOTAL))
    def request_is_duplicated_late_or_early(self, participant: int, number: int | None) -> None:
        name, open_round = self.name_of(participant), self.told if self.told < TOTAL else None
        if number is None or number == self.told:
            number = open_round
        if name in self.live and number is not None:
            self.contribute(self.live[name], self.contribution(number))

    @precondition(lambda self: self.open.decide is None and self.told < TOTAL)
    @rule(
        participant=PARTICIPANTS,
        changes=st.sampled_from(
            [
                {"samples": samples([5, 6, 7])},
                {"samples": samples([7, 8, 9], [0, 0, 1])},
                {"samples": Samples(b"", b"")},
                {"held_out": None},
                {"held_out": samples([900, 902])},
            ]
        ),
    )
    def samples_differ(self, participant: int, changes: dict[str, Any]) -> None:
        """A worker of another seed; its stream ends, or those of the others do until it sends what is right."""
        name = self.name_of(participant)
        if name in self.live:
            self.contribute(self.live[name], self.contribution(self.told, **changes))
            self.workers[name].outstanding = False

    @rule(participant=PARTICIPANTS, number=st.integers(0, 2 * TOTAL))
    def report_is_late_or_checkpoint_another_runs(self, participant: int, number: int) -> None:
        name = self.name_of(participant)
        if number > self.told:
            assert not self.join(name, number)
        elif name in self.live and number <= self.durable(name):
            assert self.apply(Progress(self.live[name], number)) == []

    # Rules: faults of the server

    @rule()
    def server_is_killed(self) -> None:
        self.reboot()

    @rule(actions=st.integers(0, 2))
    def server_will_be_killed(self, actions: int) -> None:
        """Between two of the actions that come next."""
        self.actions_to_live = actions

    # Invariants

    @invariant()
    def frontier_never_goes_back(self) -> None:
        assert self.core.frontier >= self.highest_frontier
        assert self.core.frontier == self.told
        self.highest_frontier = self.core.frontier

    @invariant()
    def one_live_session_of_each(self) -> None:
        alive = {session_id: self.core.participant_of(session_id) for session_id in self.owners}
        assert {session_id: name for session_id, name in alive.items() if name} == {
            session_id: name for name, session_id in self.live.items()
        }
        assert dict(self.core.states) == self.states

    @invariant()
    def needed_rounds_are_kept(self) -> None:
        for name, worker in self.workers.items():
            assert self.core.oldest <= worker.checkpoint, f"{name} could not resume its newest checkpoint"
            if name in self.live:
                assert self.core.oldest <= worker.next_round, f"{name} is being trained and could not go on"
        assert self.core.oldest == self.floor
        assert all(number in self.journal.kept for number in range(self.floor, self.journal.frontier))

    @invariant()
    def memory_is_bounded_by_the_participants(self) -> None:
        opened, count = self.core._open_round, len(self.names)
        assert set(opened.waiters) == set(opened.notified) == set(self.open.waiters)
        assert set(opened.waiters) <= set(self.core._sessions)
        assert set(opened.arrived) == set(opened.contributions)
        assert len(opened.contributions) <= count
        assert len(self.core._sessions) == len(self.core._session_of) <= count
        assert len(self.core._durable_rounds) == len(self.core._states) == len(self.core._last_sessions) == count
        assert all(each.round == self.core.frontier for each in opened.contributions.values())

    @invariant()
    def waiting_names_the_missing(self) -> None:
        waiting = self.core.waiting(self.now)
        if not self.open.contributions or self.open.decide is not None:
            assert waiting is None
        else:
            assert waiting is not None
            assert set(waiting.participants) == set(self.names) - set(self.open.contributions)

    def teardown(self) -> None:
        """Faults stop: whatever has happened, the run comes to its end."""
        if not hasattr(self, "core"):
            return
        self.actions_to_live = None
        for _ in range(2 * TOTAL + 8):
            self.sweep()
        assert self.core.complete
        assert sorted(self.journal.ever) == list(range(TOTAL))
        for worker in self.workers.values():
            assert worker.learnt == self.journal.ever


TestRounds = RoundsMachine.TestCase
TestRounds.settings = machine_settings(examples=300, steps=60)
