from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from codistill.config.experiment import Experiment
from codistill.config.fingerprint import identity
from codistill.rundir.records import Happened, RoundsClosed
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.tensors import decode, encode
from codistill.wire.times import duration, seconds
from codistill.wire.words import word
from codistill_server.rounds.actions import Status
from codistill_server.rounds.machine import ParticipantState
from codistill_server.storage.journal import ClosedRound, Journal, JournalError
from server.support import (
    BATCH,
    CLASSES,
    HELD_OUT,
    ROUNDS_PER_EPOCH,
    STUDENTS,
    TOTAL_ROUNDS,
    TOTAL_STEPS,
    Inbox,
    Run,
    contribution,
    independent_experiment,
    join_request,
    logits_of,
    make_experiment,
    refused,
)


class TestStreams:
    def test_a_session_that_never_was_has_no_stream(self, run: Run) -> None:
        error = refused(lambda: run.coordinator.open_stream(99, Inbox()))
        assert error.status is Status.ABORTED
        assert "session 99" in str(error)

    def test_a_second_stream_ends_the_first(self, run: Run) -> None:
        first, second = run.inboxes["ant"], Inbox()
        run.inboxes["ant"] = second
        run.coordinator.open_stream(run.session_ids["ant"], second)
        assert first.ended is not None
        assert first.ended[0] is Status.ABORTED
        run.coordinator.close_stream(run.session_ids["ant"], first)
        assert run.coordinator.states["ant"] is ParticipantState.CONNECTED, "the session has gone on on the second"
        run.close_round(0)
        assert second.rounds == [0]

    def test_a_broken_stream_makes_its_participant_disconnected(self, run: Run) -> None:
        run.coordinator.close_stream(run.session_ids["ant"], run.inboxes["ant"])
        assert run.coordinator.states["ant"] is ParticipantState.DISCONNECTED
        assert [event.participant for event in run.events("disconnected")] == ["ant"]
        run.coordinator.close_stream(run.session_ids["ant"], run.inboxes["ant"])
        assert len(run.events("disconnected")) == 1

    def test_a_session_without_a_stream_is_ended(self) -> None:
        run = Run()
        session_id = run.coordinator.join(join_request(run.experiment, "ant")).session_id
        run.join("bee")
        run.coordinator.expect_stream(session_id)
        run.coordinator.expect_stream(run.session_ids["bee"])
        assert run.coordinator.states == {"ant": ParticipantState.DISCONNECTED, "bee": ParticipantState.CONNECTED}
        assert run.coordinator.participant_of(session_id) is None

    def test_who_waits_is_told_whom_for(self, run: Run) -> None:
        run.contribute("ant", 0)
        run.clock.now += 4
        run.coordinator.tick()
        assert run.inboxes["ant"].raw == []
        run.clock.now += 2
        run.coordinator.tick()
        (reply,) = run.inboxes["ant"].replies
        assert reply.waiting == pb.Waiting(round=0, participants=["bee"], elapsed=duration(6))
        state = run.coordinator.snapshot()
        assert (list(state.waiting_for), seconds(state.waiting_time)) == (["bee"], 6)


class TestReplay:
    def test_closed_rounds_are_answered_again_with_the_same_bytes(self, run: Run) -> None:
        """More rounds than are kept in memory: the first come from the journal."""
        answers = [run.close_round(number)[0] for number in range(9)]
        run.join("ant")
        for number in (0, 8, 3, 0):
            run.contribute("ant", number)
            assert run.inboxes["ant"].raw[-1] == answers[number]
        assert run.coordinator.frontier == 9
        assert run.run_state.closed_rounds == 9

    def test_dml_replays_each_participants_own(self) -> None:
        run = Run(make_experiment().replace(distillation={"method": "dml"}))
        run.join_all()
        answers = [run.close_round(number) for number in range(8)]
        for position, participant in enumerate(run.experiment.names):
            run.contribute(participant, 0)
            assert run.inboxes[participant].raw[-1] == answers[0][position]

    @pytest.mark.parametrize("number", [0, 8])
    def test_with_other_samples_they_are_not(self, run: Run, number: int) -> None:
        for each in range(9):
            run.close_round(each)
        error = refused(lambda: run.contribute("ant", number, first=1))
        assert error.status is Status.FAILED_PRECONDITION
        assert f"round {number}: participant 'ant' has at position 0 sample 1" in str(error)
        assert f"the round has sample {number * BATCH % (10 * BATCH)}" in str(error)

    def test_other_logits_change_nothing_that_is_closed(self, run: Run) -> None:
        answer = run.close_round(0)[0]
        message = contribution(run.experiment, "ant", 0)
        message.batch.outputs["logits"].CopyFrom(encode(torch.zeros(BATCH, CLASSES), "float32"))
        run.send("ant", message)
        assert run.inboxes["ant"].raw == [answer, answer]


class TestRestart:
    @pytest.mark.parametrize("method", ["general", "min_logit", "dml"])
    def test_a_successor_gives_the_same_answers(self, tmp_path: Path, method: str) -> None:
        """With `general`, whose weights are measured at the first round of an epoch and carried over."""
        if method == "dml":
            experiment = make_experiment().replace(distillation={"method": "dml"})
        else:
            experiment = make_experiment(data={"held_out": HELD_OUT}, distillation={"ensemble": method})

        def held_out(number: int) -> bool:
            return method == "general" and number > 0 and number % ROUNDS_PER_EPOCH == 0

        whole = Run(experiment)
        whole.join_all()
        expected = [whole.close_round(number, held_out=held_out(number)) for number in range(8)]
        for number in range(8):
            run = Run(experiment, tmp_path / "journal.sqlite")
            assert run.coordinator.frontier == number
            assert (len(run.events("resumed")) == 1) == (number > 0)
            run.join_all(number)
            assert run.close_round(number, held_out=held_out(number)) == expected[number]
            run.contribute("ant", 0)
            assert run.inboxes["ant"].raw[-1] == expected[0][0]
            run.coordinator.close()
        if method == "general":
            assert len({_ratio(answers[0], experiment, number) for number, answers in enumerate(expected)}) > 1

    def test_sessions_of_before_are_over_and_numbers_go_on(self, tmp_path: Path) -> None:
        run = Run(path=tmp_path / "journal.sqlite")
        run.join_all()
        before = dict(run.session_ids)
        run.coordinator.close()
        run = Run(path=tmp_path / "journal.sqlite")
        assert refused(lambda: run.coordinator.open_stream(before["ant"], Inbox())).status is Status.ABORTED
        run.join_all()
        assert min(run.session_ids.values()) > max(before.values())

    def test_finished_participants_stay_finished(self, tmp_path: Path) -> None:
        run = Run(path=tmp_path / "journal.sqlite")
        run.join_all()
        run.close_rounds()
        run.leave("ant", pb.LEAVE_REASON_FINISHED)
        run.leave("bee", pb.LEAVE_REASON_STOPPED)
        run.coordinator.close()
        run = Run(path=tmp_path / "journal.sqlite")
        assert run.coordinator.states == {"ant": ParticipantState.FINISHED, "bee": ParticipantState.EXPECTED}
        assert not run.coordinator.complete
        run.join("bee", TOTAL_ROUNDS)
        run.leave("bee", pb.LEAVE_REASON_FINISHED)
        assert run.completed == 1
        run.coordinator.close()
        run = Run(path=tmp_path / "journal.sqlite")
        assert run.coordinator.complete
        assert run.completed == 0, "nothing happened in this one"

    def test_the_length_and_everyones_steps_are_shown_again(self, tmp_path: Path) -> None:
        run = Run(path=tmp_path / "journal.sqlite")
        run.join_all()
        for number in range(TOTAL_ROUNDS):
            run.close_round(number)
        run.report("ant", steps_trained=TOTAL_STEPS, round=TOTAL_ROUNDS, durable_round=7)
        run.leave("bee", pb.LEAVE_REASON_FINISHED)
        run.coordinator.close()
        run = Run(path=tmp_path / "journal.sqlite")
        state = run.coordinator.snapshot()
        assert (state.total_steps, state.total_rounds) == (TOTAL_STEPS, TOTAL_ROUNDS)
        assert (state.frontier, state.steps_trained) == (TOTAL_ROUNDS, TOTAL_STEPS)
        shown = {each.name: (each.steps_trained, each.round, each.durable_round) for each in state.participants}
        assert shown == {"ant": (7, 7, 7), "bee": (TOTAL_STEPS, TOTAL_ROUNDS, TOTAL_ROUNDS)}
        assert {each.name: word(pb.ParticipantState, each.state) for each in state.participants} == {
            "ant": "expected",
            "bee": "finished",
        }
        run.join("ant", 7)
        (ant, _) = run.coordinator.snapshot().participants
        assert (ant.steps_trained, ant.epochs_trained) == (7, 7 / ROUNDS_PER_EPOCH)

    def test_a_refused_join_is_logged_as_often_as_it_is_an_event(self, caplog: pytest.LogCaptureFixture) -> None:
        run = Run()
        for _ in range(200):
            refused(lambda: run.join("ant", 3))
        assert 1 <= len(caplog.messages) < 100
        assert caplog.messages[0].startswith("refused to let 'ant' join: first_round: participant 'ant' resumes at")

    def test_a_worker_ahead_of_the_journal_is_refused(self) -> None:
        run = Run()
        error = refused(lambda: run.join("ant", 3))
        assert error.status is Status.FAILED_PRECONDITION
        assert "resumes at round 3" in str(error)
        assert "ends at round 0" in str(error)


def _ratio(answer: bytes, experiment: Experiment, number: int) -> tuple[float, ...]:
    """Return the weights of the two students that a round's target was made with."""
    target = decode(pb.ExchangeResponse.FromString(answer).targets.targets["logits"]).double().reshape(-1, 1)
    logits = torch.stack([logits_of(experiment, name, number).double().reshape(-1) for name in experiment.names], 1)
    return tuple(round(each, 3) for each in torch.linalg.lstsq(logits, target).solution.reshape(-1).tolist())


def test_the_span_of_an_epoch_tells_of_all_its_rounds(run: Run) -> None:
    """The ensemble is measured before a round counts as closed, so the epoch's last round is in its epoch's span."""
    for number in range(2 * ROUNDS_PER_EPOCH):
        run.close_round(number)
    spans = [record for record in run.records if isinstance(record, RoundsClosed)]
    for span, epoch in zip(spans, range(2), strict=True):
        right = 0
        for number in range(epoch * ROUNDS_PER_EPOCH, (epoch + 1) * ROUNDS_PER_EPOCH):
            mean = torch.stack([logits_of(run.experiment, name, number).softmax(-1) for name in STUDENTS]).mean(0)
            right += int((mean.argmax(-1) == torch.arange(BATCH) % CLASSES).sum())
        assert span.ensemble_accuracy == right / (ROUNDS_PER_EPOCH * BATCH)


class TestRoundsPastTheLast:
    """A worker that knows how long the run is never sends to one."""

    @pytest.mark.parametrize("closed", [0, TOTAL_ROUNDS])
    @pytest.mark.parametrize("number", [TOTAL_ROUNDS, TOTAL_ROUNDS + 1, 2**64 - 1])
    def test_a_contribution_to_one_is_refused(self, closed: int, number: int, run: Run) -> None:
        for each in range(closed):
            run.close_round(each)
        message = contribution(run.experiment, "ant", 0)
        message.round = number
        error = refused(lambda: run.send("ant", message))
        assert (error.status, str(error)) == (
            Status.FAILED_PRECONDITION,
            f"round: {number} is not one of the run's; allowed: 0 to {TOTAL_ROUNDS - 1}",
        )
        assert [(event.participant, event.message) for event in run.events("rejected")] == [("ant", str(error))]
        assert run.coordinator.states["ant"] is ParticipantState.DISCONNECTED
        assert run.coordinator.frontier == closed
        run.join("ant", closed)
        run.close_rounds()


class TestLeave:
    def test_each_reason_has_its_event_and_state(self) -> None:
        for reason, what, state in (
            (pb.LEAVE_REASON_STOPPED, "stopped", ParticipantState.DISCONNECTED),
            (pb.LEAVE_REASON_FAILED, "failed", ParticipantState.FAILED),
            (pb.LEAVE_REASON_FINISHED, "finished", ParticipantState.FINISHED),
        ):
            run = Run()
            run.join_all()
            run.close_rounds()
            run.leave("ant", reason, "x" * 600)
            assert [(event.participant, event.message) for event in run.events(what)] == [("ant", "x" * 500)]
            assert run.coordinator.states["ant"] is state
            run.coordinator.close_stream(run.session_ids["ant"], run.inboxes["ant"])
            assert run.events("disconnected") == []

    def test_an_unknown_reason_is_refused(self, run: Run) -> None:
        error = refused(lambda: run.leave("ant", pb.LEAVE_REASON_UNSPECIFIED))
        assert error.status is Status.INVALID_ARGUMENT
        assert "FINISHED, STOPPED, FAILED" in str(error)
        assert run.coordinator.states["ant"] is ParticipantState.CONNECTED

    def test_a_session_leaves_once(self, run: Run) -> None:
        run.leave("ant", pb.LEAVE_REASON_STOPPED)
        assert refused(lambda: run.leave("ant", pb.LEAVE_REASON_STOPPED)).status is Status.ABORTED

    @pytest.mark.parametrize("closed", [0, 1, TOTAL_ROUNDS - 1])
    def test_nobody_has_finished_before_the_last_round_is_closed(self, closed: int, tmp_path: Path) -> None:
        run = Run(path=tmp_path / "journal.sqlite")
        run.join_all()
        for number in range(closed):
            run.close_round(number)
        run.report("ant", steps_trained=TOTAL_STEPS, round=TOTAL_ROUNDS)  # what it says of itself does not count
        error = refused(lambda: run.leave("ant", pb.LEAVE_REASON_FINISHED))
        assert (error.status, str(error)) == (
            Status.FAILED_PRECONDITION,
            f"reason: FINISHED is not allowed while {closed} of {TOTAL_ROUNDS} rounds are closed; leave as STOPPED or FAILED",
        )
        assert run.coordinator.states["ant"] is ParticipantState.CONNECTED, "its session goes on"
        assert run.events("finished") == []
        assert not any(record.finished for record in run.journal.restore().participants)
        run.close_rounds()
        run.leave("ant", pb.LEAVE_REASON_FINISHED)
        assert run.coordinator.states["ant"] is ParticipantState.FINISHED

    @pytest.mark.parametrize("again", ["in a new session", "after a restart"])
    @pytest.mark.parametrize("exchanging", [True, False])
    def test_a_participant_that_finished_may_come_back_and_say_it_again(
        self, exchanging: bool, again: str, tmp_path: Path
    ) -> None:
        """Its answer was lost, or it was resumed although it was done."""
        experiment = make_experiment() if exchanging else independent_experiment(STUDENTS)
        path, rounds = tmp_path / "journal.sqlite", TOTAL_ROUNDS if exchanging else 0
        run = Run(experiment, path)
        run.join_all()
        run.close_rounds()
        run.report("ant", steps_trained=TOTAL_STEPS, round=rounds, durable_round=rounds)
        run.leave("ant", pb.LEAVE_REASON_FINISHED)
        if again == "after a restart":
            run.coordinator.close()
            run = Run(experiment, path)
        run.join("ant", rounds, steps_trained=TOTAL_STEPS)
        assert run.coordinator.states["ant"] is ParticipantState.CONNECTED
        run.leave("ant", pb.LEAVE_REASON_FINISHED)
        assert run.coordinator.states["ant"] is ParticipantState.FINISHED

    def test_where_nothing_is_exchanged_all_steps_must_be_reported(self) -> None:
        run = Run(independent_experiment())
        run.join("ant")
        for steps in (0, 1, TOTAL_STEPS - 1):
            run.report("ant", steps_trained=steps)
            error = refused(lambda: run.leave("ant", pb.LEAVE_REASON_FINISHED))
            assert error.status is Status.FAILED_PRECONDITION
            assert f"while {steps} of {TOTAL_STEPS} steps are reported; leave as STOPPED or FAILED" in str(error)
        assert run.completed == 0
        run.report("ant", steps_trained=TOTAL_STEPS)
        run.leave("ant", pb.LEAVE_REASON_FINISHED)
        assert run.completed == 1

    def test_the_run_is_complete_when_the_last_has_finished(self, run: Run) -> None:
        run.close_rounds()
        run.leave("ant", pb.LEAVE_REASON_FINISHED)
        assert run.completed == 0
        assert not run.coordinator.snapshot().complete
        run.leave("bee", pb.LEAVE_REASON_FINISHED)
        assert run.completed == 1
        assert run.coordinator.complete
        assert run.coordinator.snapshot().complete
        assert [record.what for record in run.records if isinstance(record, Happened)][-2:] == ["finished", "complete"]


class _FullJournal(Journal):
    """A journal whose disk is full from a round on."""

    def __init__(self, experiment: Experiment, full_from: int) -> None:
        super().__init__(None, identity(experiment))
        self._full_from = full_from

    def append(self, closed: ClosedRound) -> None:
        if closed.round >= self._full_from:
            raise JournalError("the disk is full")
        super().append(closed)


class TestFaults:
    def test_nobody_is_answered_before_the_round_is_written(self) -> None:
        experiment = make_experiment()
        run = Run(experiment, journal=_FullJournal(experiment, 2))
        run.join_all()
        run.close_round(0)
        run.close_round(1)
        run.contribute("ant", 2)
        with pytest.raises(JournalError, match="disk is full"):
            run.contribute("bee", 2)
        assert [inbox.rounds for inbox in run.inboxes.values()] == [[0, 1], [0, 1]]
        assert run.coordinator.frontier == 2
        assert run.journal.restore().frontier == 2

    def test_after_an_error_in_the_middle_later_events_are_processed(self) -> None:
        experiment = make_experiment()
        run = Run(experiment, journal=_FullJournal(experiment, 0))
        run.join_all()
        run.contribute("ant", 0)
        with pytest.raises(JournalError, match="disk is full"):
            run.contribute("bee", 0)
        run.leave("ant", pb.LEAVE_REASON_STOPPED)
        assert refused(lambda: run.leave("ant", pb.LEAVE_REASON_STOPPED)).status is Status.ABORTED
        assert refused(lambda: run.contribute("bee", 3)).status is Status.ABORTED
        assert run.coordinator.states == {"ant": ParticipantState.DISCONNECTED, "bee": ParticipantState.DISCONNECTED}

    def test_work_that_takes_time_delays_the_answers_only(self) -> None:
        """While a round's targets are made, participants come and go; then whoever is there is answered."""
        pending: list[Callable[[], None]] = []

        def later(work: Callable[[], Any], done: Callable[[Any], None], *, heavy: bool) -> None:
            assert heavy
            pending.append(lambda: done(work()))

        run = Run(make_experiment(distillation={"ensemble": "linear"}), submit=later)
        run.join_all()
        run.contribute("ant", 0)
        run.contribute("bee", 0)
        assert run.coordinator.frontier == 0
        run.coordinator.close_stream(run.session_ids["ant"], run.inboxes["ant"])
        gone = run.inboxes["ant"]
        run.join("ant")
        run.contribute("ant", 0)
        assert len(pending) == 1, "the round is decided on once"
        pending.pop()()
        assert (gone.rounds, run.inboxes["ant"].rounds, run.inboxes["bee"].rounds) == ([], [0], [0])
        assert run.inboxes["ant"].raw == run.inboxes["bee"].raw
        assert run.coordinator.frontier == 1

    def test_bytes_are_counted(self, run: Run) -> None:
        messages = [contribution(run.experiment, participant, 0) for participant in run.experiment.names]
        for participant, message in zip(run.experiment.names, messages, strict=True):
            run.send(participant, message)
        assert run.run_state.bytes_in == sum(message.ByteSize() for message in messages)
        assert run.run_state.bytes_out == sum(len(raw) for inbox in run.inboxes.values() for raw in inbox.raw)
