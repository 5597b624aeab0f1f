"""The rounds' core where it goes on without the skipped: chosen cases, and a machine that checks what must always hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

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
    Remember,
    Skipped,
    Status,
)
from codistill_server.rounds.events import (
    Contribute,
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
from codistill_server.rounds.machine import ParticipantState, Rounds, Rules
from codistill_server.rounds.stragglers import StragglerPolicy
from server.rounds.support import contribution, joined, machine_settings

NAMES = ("ant", "bee", "cat")
RULES = Rules(NAMES, waiting_notice=5.0, stragglers=StragglerPolicy(quorum=2, round_deadline=3.0, evict_after=10.0))


class Driven:
    """A core, its sessions and the time."""

    def __init__(self, rules: Rules = RULES) -> None:
        self.core = Rounds(rules)
        self.now = 0.0
        self.session_ids: dict[str, int] = {}
        for name in rules.participants:
            self.join(name)

    def join(self, name: str, first_round: int = 0) -> None:
        self.session_ids[name] = joined(self.core, name, first_round, self.now)

    def send(self, name: str, number: int) -> list[Action]:
        return self.core.apply(Contribute(self.session_ids[name], contribution(number)), self.now)

    def tick(self, seconds: float) -> list[Action]:
        self.now += seconds
        return self.core.apply(Tick(), self.now)

    def decided(self) -> list[Action]:
        return self.core.apply(Decided(self.core.frontier), self.now)

    def close(self, *names: str) -> None:
        """Close a round with the contributions of these, who must be all that are awaited."""
        number = self.core.frontier
        actions = [action for name in names for action in self.send(name, number)]
        assert isinstance(actions[-1], Decide)
        self.decided()

    def lose(self, name: str) -> None:
        """Close the open round without one participant, at its deadline."""
        number = self.core.frontier
        for other in set(NAMES) - {name}:
            self.send(other, number)
        self.tick(3.0)
        self.decided()
        assert name not in self.core.awaited


def test_a_round_closes_at_its_deadline_without_the_skipped() -> None:
    run = Driven()
    assert run.send("ant", 0) == []
    run.now += 1
    assert run.send("bee", 0) == []
    assert [type(action) for action in run.tick(1.9)] == []
    skipped, decide = run.tick(0.1)
    assert skipped == Skipped("cat", 0, "cat had not contributed after 3.0 s; 2 contributions, quorum 2")
    assert isinstance(decide, Decide)
    assert (tuple(decide.contributions), decide.targets) == (("ant", "bee"), True)
    assert {action.participant for action in run.decided() if isinstance(action, Answer)} == {"ant", "bee"}


def test_a_skipped_participant_is_not_waited_for_again() -> None:
    run = Driven()
    run.lose("cat")
    assert run.core.waiting(run.now) is None
    run.send("bee", 1)
    waiting = run.core.waiting(run.now)
    assert waiting is not None
    assert waiting.participants == ("ant",)
    run.close("ant")


def test_it_catches_up_and_is_waited_for_again_at_the_frontier() -> None:
    run = Driven()
    run.lose("cat")
    for _ in range(3):
        run.close("ant", "bee")
    for number in range(3):
        assert [type(action) for action in run.send("cat", number)] == [Answer]
    awaited, answer = run.send("cat", 3)  # its next one is for the open round
    assert awaited == Awaited("cat", 4)
    assert isinstance(answer, Answer)
    run.send("ant", 4)
    assert run.send("bee", 4) == [], "the frontier waits for it"
    (decide,) = run.send("cat", 4)
    assert isinstance(decide, Decide)
    assert tuple(decide.contributions) == NAMES


def test_one_that_is_slower_than_the_deadline_is_not_waited_for_but_taken_in() -> None:
    run = Driven()
    run.lose("cat")
    run.close("ant", "bee")
    run.send("cat", 0)
    run.now += 5.0
    assert [type(action) for action in run.send("cat", 1)] == [Answer], "its last step took longer than a round waits"
    assert "cat" not in run.core.awaited
    run.now += 5.0
    assert run.send("cat", 2) == []
    run.send("ant", 2)
    (decide,) = run.send("bee", 2)
    assert isinstance(decide, Decide)
    assert tuple(decide.contributions) == NAMES


@pytest.mark.parametrize(("seconds", "back"), [(14.9, True), (15.1, False)])
def test_where_one_step_in_five_exchanges_each_of_the_five_is_compared(seconds: float, back: bool) -> None:
    run = Driven(replace(RULES, steps_per_round=5))
    run.lose("cat")
    run.close("ant", "bee")
    run.send("cat", 0)
    run.now += seconds
    run.send("cat", 1)
    assert ("cat" in run.core.awaited) == back


def test_below_the_quorum_a_round_closes_without_targets() -> None:
    run = Driven()
    run.send("bee", 0)
    *skipped, decide = run.tick(3.0)
    assert [action.participant for action in skipped if isinstance(action, Skipped)] == ["ant", "cat"]
    assert isinstance(decide, Decide)
    assert not decide.targets
    run.decided()
    (alone,) = run.send("bee", 1)
    assert isinstance(alone, Decide), "it does not wait for a deadline each time"


@pytest.mark.parametrize("reason", [LeaveReason.STOPPED, LeaveReason.FAILED])
def test_a_goodbye_is_a_skip_at_once(reason: LeaveReason) -> None:
    run = Driven()
    run.send("ant", 0)
    run.send("bee", 0)
    skipped, decide = run.core.apply(Leave(run.session_ids["cat"], reason), run.now)
    assert skipped == Skipped("cat", 0, f"participant 'cat' {reason.value}")
    assert isinstance(decide, Decide)


def test_so_is_a_contribution_of_no_use() -> None:
    run = Driven()
    run.send("ant", 0)
    run.send("bee", 0)
    skipped, decide = run.core.apply(Disconnect(run.session_ids["cat"], lost=True), run.now)
    assert isinstance(skipped, Skipped)
    assert isinstance(decide, Decide)


def test_so_are_samples_that_are_not_the_rounds() -> None:
    run = Driven()
    run.send("ant", 0)
    run.send("bee", 0)
    other = contribution(0, samples=contribution(5).samples)
    end, skipped, decide = run.core.apply(Contribute(run.session_ids["cat"], other), run.now)
    assert isinstance(end, End)
    assert end.status is Status.FAILED_PRECONDITION
    assert skipped == Skipped("cat", 0, "what participant 'cat' sends is of no use")
    assert isinstance(decide, Decide)
    assert "cat" not in decide.contributions


def test_a_broken_connection_is_waited_for_until_the_deadline() -> None:
    run = Driven()
    run.send("ant", 0)
    run.send("bee", 0)
    assert run.core.apply(Disconnect(run.session_ids["cat"]), run.now) == []
    run.tick(2)
    run.join("cat")
    assert isinstance(run.send("cat", 0)[-1], Decide)


def test_a_participant_that_never_joined_is_given_longer() -> None:
    run = Driven()
    run.core = Rounds(RULES)
    for name in ("ant", "bee"):
        run.join(name)
        run.send(name, 0)
    assert [type(action) for action in run.tick(9.9)] == [Notify, Notify]
    assert any(isinstance(action, Decide) for action in run.tick(0.1))


def test_a_silent_skipped_participant_is_evicted() -> None:
    run = Driven()
    run.lose("cat")
    run.now += 6
    run.close("ant", "bee")
    assert run.tick(0.9) == []
    (end,) = run.tick(0.2)
    assert isinstance(end, End)
    assert (end.participant, end.status) == ("cat", Status.ABORTED)
    assert "nothing came from participant 'cat' for 10 s" in end.message
    assert "join again" in end.message
    assert run.core.states["cat"] is ParticipantState.DISCONNECTED
    run.join("cat", 0)
    run.send("cat", 0)
    assert [type(action) for action in run.send("cat", 1)] == [Awaited, Answer]


def test_one_that_waits_for_others_is_not_silent() -> None:
    run = Driven()
    run.send("ant", 0)
    assert not [action for action in run.tick(100) if isinstance(action, End) and action.participant == "ant"]


def test_a_skipped_participant_of_other_samples_is_not_awaited() -> None:
    run = Driven()
    run.lose("cat")
    run.send("ant", 1)
    other = contribution(1, samples=contribution(5).samples)
    (end,) = run.core.apply(Contribute(run.session_ids["cat"], other), run.now)
    assert isinstance(end, End)
    assert "cat" not in run.core.awaited


def test_the_only_contribution_cannot_be_changed_while_it_is_being_decided() -> None:
    run = Driven()
    run.send("bee", 0)
    assert isinstance(run.tick(3.0)[-1], Decide)
    other = contribution(0, samples=contribution(5).samples)
    end, skipped = run.core.apply(Contribute(run.session_ids["bee"], other), run.now)
    assert isinstance(end, End)
    assert end.status is Status.FAILED_PRECONDITION
    assert isinstance(skipped, Skipped)
    assert [type(action) for action in run.decided()] == []


def test_with_the_rule_to_wait_nothing_closes_a_round_early() -> None:
    run = Driven(Rules(NAMES))
    run.send("ant", 0)
    run.send("bee", 0)
    assert [type(action) for action in run.tick(10_000)] == [Notify, Notify]
    assert run.core.apply(Leave(run.session_ids["cat"], LeaveReason.FAILED), run.now) == []


TOTAL = 6


class AbsenceMachine(RuleBasedStateMachine):
    """Participants that pause, die, leave and come back, and a server that dies, under the rule to go on."""

    @initialize(quorum=st.integers(2, 3))
    def start(self, quorum: int) -> None:
        self.rules_of_run = Rules(NAMES, stragglers=StragglerPolicy(quorum, 3.0, 10.0))
        self.now = 0.0
        self.journal: dict[int, tuple[tuple[str, ...], bool]] = {}
        self.finished: set[str] = set()
        self.next_round = dict.fromkeys(NAMES, 0)
        self.boot()

    def boot(self) -> None:
        records = tuple(ParticipantRecord(name, 100, 0, finished=name in self.finished) for name in NAMES)
        self.core = Rounds(self.rules_of_run, Restored(0, len(self.journal), records))
        self.session_ids: dict[str, int] = {}
        self.outstanding: dict[str, int] = {}
        self.contributed: set[str] = set()
        self.opened: float | None = None
        self.deciding = False

    def apply(self, event: Event) -> list[Action]:
        before = set(self.core.awaited)
        actions = self.core.apply(event, self.now)
        for action in actions:
            match action:
                case Decide():
                    assert not self.deciding
                    assert action.round == len(self.journal)
                    assert set(action.contributions) == self.contributed, "whoever is in time counts"
                    assert tuple(action.contributions) == tuple(name for name in NAMES if name in self.contributed)
                    assert action.targets == (len(self.contributed) >= self.rules_of_run.stragglers.quorum)  # type: ignore[union-attr]
                    assert self.core.awaited <= self.contributed, "closed although an awaited participant is missing"
                    self.deciding = True
                    self.journal[action.round] = (tuple(action.contributions), action.targets)
                case Answer(session_id, participant, asked):
                    assert asked.round in self.journal, "answered before it was journalled"
                    assert self.session_ids[participant] == session_id
                    if self.next_round[participant] == asked.round:
                        self.next_round[participant] += 1
                    self.outstanding.pop(participant, None)
                case Skipped(participant):
                    assert participant in before
                    assert participant not in self.core.awaited
                    assert participant not in self.contributed or not isinstance(event, Tick)
                case Awaited(participant):
                    assert participant not in before
                case End(session_id, participant, status):
                    if status is Status.ABORTED:
                        assert participant not in self.core.awaited, "only a skipped participant is evicted"
                        self.session_ids.pop(participant)
                    assert session_id not in self.session_ids.values()
                    self.outstanding.pop(participant, None)
                case Remember() | Admit() | Notify() | Forget() | Complete():
                    pass
                case _:
                    raise AssertionError(action)
        return actions

    @rule(name=st.sampled_from(NAMES))
    def step(self, name: str) -> None:
        if name in self.finished:
            return
        if name not in self.session_ids:
            admit = self.apply(Join(name, self.next_round[name]))[-1]
            assert isinstance(admit, Admit)
            self.session_ids[name] = admit.session_id
            return
        number = self.next_round[name]
        if number == TOTAL:
            self.finished.add(name)
            session_id = self.session_ids.pop(name)
            self.apply(Leave(session_id, LeaveReason.FINISHED))
        elif self.outstanding.get(name) != number:
            self.outstanding[name] = number
            if number == self.core.frontier and not self.deciding:
                self.contributed.add(name)
                self.opened = self.now if self.opened is None else self.opened
            self.apply(Contribute(self.session_ids[name], contribution(number)))

    @rule()
    def settle(self) -> None:
        if self.deciding:
            self.deciding, self.contributed, self.opened = False, set(), None
            self.apply(Decided(self.core.frontier))

    @rule(seconds=st.sampled_from([0.0, 0.5, 3.0, 10.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.apply(Tick())
        if self.opened is not None and not self.deciding:
            assert self.now - self.opened < 10.0, "nobody waits past the longest bound"

    @rule(name=st.sampled_from(NAMES), how=st.sampled_from(["breaks", "useless", *LeaveReason]))
    def goes(self, name: str, how: Any) -> None:
        if name not in self.session_ids or how is LeaveReason.FINISHED:
            return
        session_id = self.session_ids.pop(name)
        self.outstanding.pop(name, None)
        leaves = isinstance(how, LeaveReason)
        self.apply(Leave(session_id, how) if leaves else Disconnect(session_id, lost=how == "useless"))

    @rule(name=st.sampled_from(NAMES), back=st.integers(1, 4))
    def is_restarted_from_an_older_checkpoint(self, name: str, back: int) -> None:
        if name in self.finished:
            return
        self.next_round[name] = max(0, self.next_round[name] - back)
        self.outstanding.pop(name, None)
        self.session_ids.pop(name, None)
        self.step(name)

    @rule()
    def reports(self) -> None:
        for name, session_id in self.session_ids.items():
            self.core.apply(Progress(session_id, 0), self.now)
            assert name in NAMES

    @rule()
    def server_dies(self) -> None:
        if not self.deciding:
            self.boot()

    @invariant()
    def memory_is_bounded_by_the_participants(self) -> None:
        core = self.core
        assert set(core._heard_at) == set(core._sessions)
        assert set(core._answered_at) <= set(core._sessions)
        assert set(core.awaited) <= set(NAMES)

    def teardown(self) -> None:
        """Faults stop: every participant trains all its rounds, each with what the journal has."""
        if not hasattr(self, "core"):
            return
        for _ in range(20 * TOTAL):
            self.settle()
            for name in NAMES:
                self.step(name)
            self.time_passes(3.0)
        assert self.finished == set(NAMES)
        assert sorted(self.journal) == list(range(TOTAL))
        assert self.core.complete


TestAbsence = AbsenceMachine.TestCase
TestAbsence.settings = machine_settings(examples=200, steps=50)
