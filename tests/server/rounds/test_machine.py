from __future__ import annotations

import pytest

from codistill_server.rounds.actions import (
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
    Waiting,
)
from codistill_server.rounds.events import (
    Contribute,
    Decided,
    Disconnect,
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
from server.rounds.support import contribution, joined, samples

PARTICIPANTS = ("ant", "bee")
RULES = Rules(PARTICIPANTS, waiting_notice=5.0)


def pair(rounds: Rounds | None = None, first_round: int = 0) -> tuple[Rounds, int, int]:
    rounds = rounds or Rounds(RULES)
    return rounds, joined(rounds, "ant", first_round), joined(rounds, "bee", first_round)


def close(rounds: Rounds, ant: int, bee: int, count: int = 1) -> None:
    for _ in range(count):
        number = rounds.frontier
        assert rounds.apply(Contribute(ant, contribution(number)), 0.0) == []
        (decide,) = rounds.apply(Contribute(bee, contribution(number)), 0.0)
        assert isinstance(decide, Decide)
        assert len(rounds.apply(Decided(number), 0.0)) == 2


def record(participant: str, session_id: int, durable: int = 0, *, finished: bool = False) -> Remember:
    return Remember(ParticipantRecord(participant, session_id, durable, finished))


def unknown(session_id: int) -> Refuse:
    return Refuse(Status.ABORTED, f"session {session_id} is over or unknown to this server; join again")


class TestJoin:
    def test_a_participant_is_remembered_before_it_is_admitted(self) -> None:
        rounds = Rounds(RULES)
        assert rounds.states == {"ant": ParticipantState.EXPECTED, "bee": ParticipantState.EXPECTED}
        assert rounds.apply(Join("bee", 0), 1.0) == [record("bee", 1), Admit("bee", 1, 0)]
        assert rounds.states == {"ant": ParticipantState.EXPECTED, "bee": ParticipantState.CONNECTED}
        assert rounds.participant_of(1) == "bee"
        assert rounds.participant_of(2) is None

    def test_the_newer_worker_wins(self) -> None:
        rounds, ant, _ = pair()
        assert rounds.apply(Join("ant", 0), 1.0) == [
            End(
                ant,
                "ant",
                Status.SUPERSEDED,
                "a newer worker of participant 'ant' has joined; this one must not go on",
            ),
            record("ant", 3),
            Admit("ant", 3, 0),
        ]
        assert rounds.participant_of(ant) is None
        assert rounds.apply(Contribute(ant, contribution(0)), 1.0) == [unknown(ant)]

    @pytest.mark.parametrize("restarted", [False, True])
    def test_an_older_worker_does_not_take_its_participant_back(self, restarted: bool) -> None:
        """Its connection was lost, so that nobody could tell it that a newer one had joined."""
        rounds = Rounds(RULES)
        rounds.apply(Join("ant", 0, worker_id=71), 0.0)
        rounds.apply(Join("ant", 0, worker_id=72), 0.0)
        if restarted:
            kept = ParticipantRecord("ant", 2, 0, finished=False, worker_id=72)
            rounds = Rounds(RULES, Restored(participants=(kept,)))
        assert rounds.apply(Join("ant", 0, worker_id=71, session_id=1), 1.0) == [
            Refuse(Status.SUPERSEDED, "a newer worker of participant 'ant' has joined; this one must not go on")
        ]
        assert rounds.participant_of(2) == (None if restarted else "ant")
        assert isinstance(rounds.apply(Join("ant", 0, worker_id=72, session_id=2), 1.0)[-1], Admit)

    def test_a_worker_that_joins_twice_is_not_superseded_by_itself(self) -> None:
        """An answer was lost, or a call that it had given up came late."""
        rounds = Rounds(RULES)
        rounds.apply(Join("ant", 0, worker_id=71), 0.0)
        for session_id in (0, 1):
            ended, remembered, _ = rounds.apply(Join("ant", 0, worker_id=71, session_id=session_id), 1.0)
            assert isinstance(ended, End)
            assert (ended.status, ended.message) == (
                Status.ABORTED,
                "the worker of participant 'ant' has joined again; join again",
            )
            assert isinstance(remembered, Remember)
            assert remembered.record.worker_id == 71

    def test_a_journal_that_knows_no_worker_lets_any_go_on(self) -> None:
        rounds = Rounds(RULES, Restored(participants=(ParticipantRecord("ant", 5, 0, finished=False),)))
        assert isinstance(rounds.apply(Join("ant", 0, worker_id=71, session_id=3), 0.0)[-1], Admit)

    def test_the_old_workers_broken_stream_does_not_touch_the_new_one(self) -> None:
        rounds, ant, _ = pair()
        newer = joined(rounds, "ant")
        assert rounds.apply(Disconnect(ant), 1.0) == []
        assert rounds.states["ant"] is ParticipantState.CONNECTED
        assert rounds.participant_of(newer) == "ant"

    def test_a_stranger_is_refused_and_the_participants_are_named(self) -> None:
        assert Rounds(RULES).apply(Join("cat", 0), 0.0) == [
            Refuse(Status.FAILED_PRECONDITION, "participant 'cat' is not one of this run's; allowed: ant, bee")
        ]

    def test_a_checkpoint_ahead_of_the_journal_is_refused(self) -> None:
        assert Rounds(RULES, Restored(0, 4)).apply(Join("ant", 5), 0.0) == [
            Refuse(
                Status.FAILED_PRECONDITION,
                "first_round: participant 'ant' resumes at round 5, but this server's journal ends at round 4: start the "
                "server with the --run-dir of the run's whole journal; if its end is lost (a power cut: see "
                "exchange.journal.durability), remove the participant's checkpoint.safetensors, so that it resumes from the "
                "one before it",
            )
        ]

    def test_a_checkpoint_older_than_the_journal_is_refused(self) -> None:
        rounds = Rounds(RULES, Restored(3, 4))
        assert rounds.apply(Join("ant", 2), 0.0) == [
            Refuse(
                Status.FAILED_PRECONDITION,
                "first_round: participant 'ant' needs round 2, but the journal keeps rounds from 3 on: start it with the "
                "--run-dir that holds its newest checkpoint, or run with exchange.journal.keep: all",
            )
        ]
        assert rounds.states["ant"] is ParticipantState.EXPECTED

    def test_a_refused_join_leaves_the_session_that_is_there(self) -> None:
        rounds, ant, _ = pair()
        assert isinstance(rounds.apply(Join("ant", 1), 0.0)[0], Refuse)
        assert rounds.participant_of(ant) == "ant"

    @pytest.mark.parametrize("first_round", [3, 4])
    def test_every_round_that_is_kept_and_the_open_one_can_be_resumed(self, first_round: int) -> None:
        rounds = Rounds(RULES, Restored(3, 4))
        assert rounds.apply(Join("ant", first_round), 0.0) == [record("ant", 1), Admit("ant", 1, 4)]

    def test_an_older_checkpoint_than_reported_keeps_its_rounds(self) -> None:
        rounds, ant, bee = pair()
        close(rounds, ant, bee, 4)
        rounds.apply(Progress(ant, 3), 0.0)
        rounds.apply(Progress(bee, 1), 0.0)
        assert rounds.apply(Join("ant", 2), 0.0)[1] == record("ant", 3, durable=2)
        assert rounds.apply(Progress(bee, 4), 0.0) == [record("bee", bee, durable=4), Forget(2)]
        assert rounds.apply(Contribute(3, contribution(2)), 0.0) == [Answer(3, "ant", contribution(2))]


class TestRound:
    def test_it_is_decided_when_the_last_contribution_is_in_and_answered_when_it_is_journalled(self) -> None:
        rounds, ant, bee = pair()
        last, first = contribution(0, "of ant"), contribution(0, "of bee")
        assert rounds.apply(Contribute(bee, first), 1.0) == []
        (decide,) = rounds.apply(Contribute(ant, last), 3.0)
        assert decide == Decide(0, {"ant": last, "bee": first}, {"ant": 3.0, "bee": 1.0})
        assert list(decide.contributions) == ["ant", "bee"]
        assert rounds.frontier == 0
        assert rounds.apply(Decided(0), 4.0) == [Answer(bee, "bee", first), Answer(ant, "ant", last)]
        assert rounds.frontier == 1

    def test_a_closed_round_is_answered_as_often_as_it_is_asked_for(self) -> None:
        rounds, ant, bee = pair()
        close(rounds, ant, bee, 2)
        for number in (0, 1, 0):
            again = contribution(number, "again")
            assert rounds.apply(Contribute(ant, again), 1.0) == [Answer(ant, "ant", again)]
        assert rounds.frontier == 2

    def test_a_repeated_contribution_takes_the_first_ones_place(self) -> None:
        rounds, ant, bee = pair()
        rounds.apply(Contribute(ant, contribution(0, "first")), 1.0)
        assert rounds.apply(Contribute(ant, contribution(0, "second")), 2.0) == []
        (decide,) = rounds.apply(Contribute(bee, contribution(0)), 3.0)
        assert isinstance(decide, Decide)
        assert decide.contributions["ant"].payload == "second"
        assert decide.arrived == {"ant": 2.0, "bee": 3.0}
        assert [action.session_id for action in rounds.apply(Decided(0), 4.0)] == [ant, bee]  # type: ignore[union-attr]

    def test_a_contribution_outlives_its_session(self) -> None:
        rounds, ant, bee = pair()
        rounds.apply(Contribute(ant, contribution(0, "of ant")), 1.0)
        rounds.apply(Disconnect(ant), 1.5)
        (decide,) = rounds.apply(Contribute(bee, contribution(0)), 2.0)
        assert isinstance(decide, Decide)
        assert decide.contributions["ant"].payload == "of ant"
        assert rounds.apply(Decided(0), 3.0) == [Answer(bee, "bee", contribution(0))]

    def test_who_comes_back_while_the_round_is_being_decided_is_answered_with_it(self) -> None:
        rounds, ant, bee = pair()
        rounds.apply(Contribute(ant, contribution(0)), 1.0)
        rounds.apply(Contribute(bee, contribution(0)), 1.0)
        newer = joined(rounds, "ant")
        late = contribution(0, "late")
        assert rounds.apply(Contribute(newer, late), 2.0) == []
        assert rounds.apply(Decided(0), 3.0) == [Answer(bee, "bee", contribution(0)), Answer(newer, "ant", late)]

    def test_a_future_round_ends_the_session_and_names_the_one_expected(self) -> None:
        rounds, ant, _ = pair(Rounds(RULES, Restored(0, 4)), first_round=4)
        assert rounds.apply(Contribute(ant, contribution(6)), 1.0) == [
            End(ant, "ant", Status.ABORTED, "round 6 is not open; expected round 4, or one before it; join again")
        ]
        assert rounds.states["ant"] is ParticipantState.DISCONNECTED
        assert rounds.frontier == 4

    def test_a_forgotten_round_ends_the_session_and_names_the_oldest(self) -> None:
        rounds, ant, _ = pair(Rounds(RULES, Restored(2, 4)), first_round=4)
        assert rounds.apply(Contribute(ant, contribution(1)), 1.0) == [
            End(
                ant,
                "ant",
                Status.FAILED_PRECONDITION,
                "round 1 is not kept any more; the journal keeps rounds from 2 on",
            )
        ]

    def test_an_unknown_session_is_refused(self) -> None:
        assert Rounds(RULES).apply(Contribute(41, contribution(0)), 0.0) == [unknown(41)]

    def test_a_method_without_an_exchange_takes_no_contribution(self) -> None:
        rounds = Rounds(Rules(PARTICIPANTS, exchanges=False))
        ant = joined(rounds, "ant", first_round=17)
        assert rounds.apply(Contribute(ant, contribution(0)), 0.0) == [
            End(
                ant,
                "ant",
                Status.FAILED_PRECONDITION,
                "this run's method exchanges nothing; a contribution is not allowed",
            )
        ]

    @pytest.mark.parametrize("number", [0, 2])
    def test_only_the_open_round_can_be_decided(self, number: int) -> None:
        rounds, ant, bee = pair()
        close(rounds, ant, bee)
        rounds.apply(Contribute(ant, contribution(1)), 1.0)
        rounds.apply(Contribute(bee, contribution(1)), 1.0)
        with pytest.raises(ValueError, match=f"round {number} is decided, but round 1 is the open one"):
            rounds.apply(Decided(number), 2.0)

    def test_a_round_that_is_not_full_cannot_be_decided(self) -> None:
        rounds, ant, _ = pair()
        rounds.apply(Contribute(ant, contribution(0)), 1.0)
        with pytest.raises(ValueError, match="round 0 is decided, but round 0 is the open one"):
            rounds.apply(Decided(0), 2.0)


class TestMismatch:
    SEED = ", from participant 'ant': seed, data and batch size must be the same for all"

    @pytest.mark.parametrize(
        ("theirs", "problem"),
        [
            (samples([7, 8]), "2 samples, the round has 3"),
            (samples([]), "0 samples, the round has 3"),
            (samples([7, 1, 9]), "at position 1 sample 1 with label 0, the round has sample 8 with label 0"),
            (samples([7, 8, 9], [0, 0, 5]), "at position 2 sample 9 with label 5, the round has sample 9 with label 0"),
        ],
    )
    def test_other_samples_end_the_session_and_both_values_are_named(self, theirs: Samples, problem: str) -> None:
        rounds, ant, bee = pair()
        rounds.apply(Contribute(ant, contribution(0)), 1.0)
        assert rounds.apply(Contribute(bee, contribution(0, samples=theirs)), 2.0) == [
            End(bee, "bee", Status.FAILED_PRECONDITION, f"round 0: participant 'bee' has {problem}{self.SEED}")
        ]
        assert rounds.states == {"ant": ParticipantState.CONNECTED, "bee": ParticipantState.DISCONNECTED}
        assert rounds.waiting(2.0) == Waiting(0, ("bee",), 1.0)

    @pytest.mark.parametrize(
        ("first", "second", "problem"),
        [
            (None, samples([1]), "participant 'bee' sent some held-out samples, participant 'ant' sent no"),
            (samples([1]), None, "participant 'bee' sent no held-out samples, participant 'ant' sent some"),
        ],
    )
    def test_held_out_samples_of_one_only(self, first: Samples | None, second: Samples | None, problem: str) -> None:
        rounds, ant, bee = pair()
        rounds.apply(Contribute(ant, contribution(0, held_out=first)), 1.0)
        (end,) = rounds.apply(Contribute(bee, contribution(0, held_out=second)), 2.0)
        assert end == End(
            bee, "bee", Status.FAILED_PRECONDITION, f"round 0: {problem}: data.held_out must be the same for all"
        )

    def test_other_held_out_samples(self) -> None:
        rounds, ant, bee = pair()
        rounds.apply(Contribute(ant, contribution(0, held_out=samples([1, 2]))), 1.0)
        (end,) = rounds.apply(Contribute(bee, contribution(0, held_out=samples([1, 3]))), 2.0)
        assert end == End(
            bee,
            "bee",
            Status.FAILED_PRECONDITION,
            "round 0: participant 'bee' has held out at position 1 sample 3 with label 0, the round has sample 2 with "
            "label 0, from participant 'ant': data.held_out and data.split_seed must be the same for all",
        )

    def test_a_participant_alone_may_correct_itself(self) -> None:
        rounds, ant, bee = pair()
        rounds.apply(Contribute(ant, contribution(0, samples=samples([1]))), 1.0)
        assert rounds.apply(Contribute(ant, contribution(0)), 2.0) == []
        assert isinstance(rounds.apply(Contribute(bee, contribution(0)), 3.0)[0], Decide)

    @pytest.mark.parametrize("participant", ["ant", "bee"])
    def test_samples_that_nobody_stands_for_any_more_give_way(self, participant: str) -> None:
        rounds = Rounds(Rules((*PARTICIPANTS, "cat"), waiting_notice=5.0))
        session_ids = {name: joined(rounds, name) for name in rounds.rules.participants}
        for name in PARTICIPANTS:
            rounds.apply(Contribute(session_ids[name], contribution(0, samples=samples([1]))), 1.0)
        for name in PARTICIPANTS:
            rounds.apply(Disconnect(session_ids[name]), 2.0)
        again = joined(rounds, participant)
        assert rounds.apply(Contribute(again, contribution(0)), 7.0) == []
        missing = tuple(name for name in rounds.rules.participants if name != participant)
        assert rounds.waiting(8.0) == Waiting(0, missing, 1.0)

    def test_a_round_that_is_being_decided_gives_way_to_nobody(self) -> None:
        rounds, ant, bee = pair()
        for session_id in (ant, bee):
            rounds.apply(Contribute(session_id, contribution(0)), 1.0)
            rounds.apply(Disconnect(session_id), 1.0)
        again = joined(rounds, "bee")
        (end,) = rounds.apply(Contribute(again, contribution(0, samples=samples([7, 8]))), 2.0)
        assert end == End(
            again,
            "bee",
            Status.FAILED_PRECONDITION,
            f"round 0: participant 'bee' has 2 samples, the round has 3{self.SEED}",
        )


class TestLeave:
    @pytest.mark.parametrize(
        ("reason", "state"),
        [(LeaveReason.STOPPED, ParticipantState.DISCONNECTED), (LeaveReason.FAILED, ParticipantState.FAILED)],
    )
    def test_who_leaves_before_its_end_is_waited_for(self, reason: LeaveReason, state: ParticipantState) -> None:
        rounds, ant, bee = pair()
        assert rounds.apply(Leave(ant, reason), 0.0) == []
        assert rounds.states["ant"] is state
        rounds.apply(Contribute(bee, contribution(0)), 1.0)
        assert rounds.waiting(3.0) == Waiting(0, ("ant",), 2.0)
        assert not rounds.complete

    def test_the_run_is_complete_when_everybody_has_finished(self) -> None:
        rounds, ant, bee = pair()
        close(rounds, ant, bee, 2)
        assert rounds.apply(Leave(ant, LeaveReason.FINISHED), 0.0) == [record("ant", ant, durable=2, finished=True)]
        assert not rounds.complete
        assert rounds.apply(Disconnect(ant), 0.0) == []
        assert rounds.states["ant"] is ParticipantState.FINISHED
        assert rounds.apply(Leave(bee, LeaveReason.FINISHED), 0.0) == [
            record("bee", bee, durable=2, finished=True),
            Forget(2),
            Complete(),
        ]
        assert rounds.complete

    def test_a_finished_participant_that_joins_again_is_not_finished(self) -> None:
        rounds = Rounds(
            RULES, Restored(1, 2, tuple(ParticipantRecord(name, 1, 2, finished=True) for name in PARTICIPANTS))
        )
        assert rounds.complete
        assert rounds.apply(Join("ant", 2), 0.0) == [record("ant", 2, durable=2), Admit("ant", 2, 2)]
        assert not rounds.complete
        assert rounds.apply(Leave(2, LeaveReason.FINISHED), 0.0)[-1] == Complete()

    @pytest.mark.parametrize("event", [Leave(9, LeaveReason.FINISHED), Progress(9, 1)])
    def test_a_session_that_is_over_is_refused(self, event: Leave | Progress) -> None:
        assert Rounds(RULES).apply(event, 0.0) == [unknown(9)]


class TestProgress:
    def test_rounds_are_forgotten_once_no_participant_needs_them(self) -> None:
        rounds, ant, bee = pair()
        close(rounds, ant, bee, 5)
        assert rounds.apply(Progress(ant, 4), 0.0) == [record("ant", ant, durable=4)]
        assert rounds.oldest == 0
        assert rounds.apply(Progress(bee, 3), 0.0) == [record("bee", bee, durable=3), Forget(3)]
        assert rounds.oldest == 3
        assert rounds.durable_rounds == {"ant": 4, "bee": 3}

    def test_a_report_that_says_nothing_new_changes_nothing(self) -> None:
        rounds, ant, bee = pair()
        close(rounds, ant, bee, 3)
        rounds.apply(Progress(ant, 2), 0.0)
        assert rounds.apply(Progress(ant, 2), 0.0) == []
        assert rounds.apply(Progress(ant, 1), 0.0) == []
        assert rounds.durable_rounds["ant"] == 2

    def test_a_durable_round_past_the_frontier_counts_as_the_frontier(self) -> None:
        rounds, ant, bee = pair()
        close(rounds, ant, bee, 2)
        assert rounds.apply(Progress(ant, 10**9), 0.0) == [record("ant", ant, durable=2)]

    def test_keep_all_forgets_nothing(self) -> None:
        rounds, ant, bee = pair(Rounds(Rules(PARTICIPANTS, keep_all=True)))
        close(rounds, ant, bee, 3)
        for session_id in (ant, bee):
            actions = rounds.apply(Progress(session_id, 3), 0.0)
            assert [type(action) for action in actions] == [Remember]
        assert rounds.oldest == 0

    def test_without_an_exchange_progress_is_the_participants_own(self) -> None:
        rounds = Rounds(Rules(PARTICIPANTS, exchanges=False))
        ant = joined(rounds, "ant")
        assert rounds.apply(Progress(ant, 50), 0.0) == [record("ant", ant, durable=50)]
        assert rounds.durable_rounds == {"ant": 50, "bee": 0}


class TestWaiting:
    def test_nobody_is_waited_for_before_the_first_contribution_and_while_deciding(self) -> None:
        rounds, ant, bee = pair()
        assert rounds.waiting(1.0) is None
        rounds.apply(Contribute(bee, contribution(0)), 2.0)
        assert rounds.waiting(2.5) == Waiting(0, ("ant",), 0.5)
        rounds.apply(Contribute(ant, contribution(0)), 3.0)
        assert rounds.waiting(9.0) is None
        assert rounds.apply(Tick(), 60.0) == []

    def test_only_those_who_wait_are_told_and_at_their_own_pace(self) -> None:
        rounds = Rounds(Rules((*PARTICIPANTS, "cat"), waiting_notice=5.0))
        ant, bee, _ = (joined(rounds, name) for name in rounds.rules.participants)
        rounds.apply(Contribute(ant, contribution(0)), 10.0)
        rounds.apply(Contribute(bee, contribution(0)), 12.0)
        assert rounds.apply(Tick(), 14.9) == []
        assert rounds.apply(Tick(), 15.0) == [Notify(ant, Waiting(0, ("cat",), 5.0))]
        assert rounds.apply(Tick(), 17.0) == [Notify(bee, Waiting(0, ("cat",), 7.0))]
        assert rounds.apply(Tick(), 19.9) == []
        rounds.apply(Contribute(ant, contribution(0)), 19.9)
        assert rounds.apply(Tick(), 20.0) == []
        rounds.apply(Disconnect(bee), 21.0)
        assert rounds.apply(Tick(), 25.0) == [Notify(ant, Waiting(0, ("cat",), 15.0))]


class TestRestored:
    def test_a_server_that_died_goes_on_where_its_journal_ends(self) -> None:
        participants = (ParticipantRecord("ant", 5, 2, finished=False), ParticipantRecord("bee", 9, 4, finished=True))
        rounds = Rounds(RULES, Restored(2, 4, participants))
        assert (rounds.oldest, rounds.frontier) == (2, 4)
        assert rounds.states == {"ant": ParticipantState.EXPECTED, "bee": ParticipantState.FINISHED}
        assert rounds.durable_rounds == {"ant": 2, "bee": 4}
        assert rounds.participant_of(5) is None
        assert rounds.apply(Contribute(5, contribution(4)), 0.0) == [unknown(5)]
        assert rounds.apply(Join("ant", 2), 0.0) == [record("ant", 10, durable=2), Admit("ant", 10, 4)]
        assert rounds.apply(Contribute(10, contribution(3)), 0.0) == [Answer(10, "ant", contribution(3))]
