from __future__ import annotations

import pytest
import torch
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from codistill.config.experiment import Experiment
from codistill.config.fingerprint import identity_sha256
from codistill.config.methods import Independent
from codistill.config.schedule import EVERY_STEP, ExchangeSchedule
from codistill.rundir.records import Happened, Joined, Measured, Paced, ParticipantWait, Record, RoundsClosed
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.times import duration, seconds
from codistill_server.observability.state import RunState
from codistill_server.rounds.actions import Status, Waiting
from codistill_server.rounds.machine import ParticipantState
from server.support import Clock, make_experiment

NAMES = ("ant", "bee", "cat")
EVERYBODY: dict[str, ParticipantState] = dict.fromkeys(NAMES, ParticipantState.CONNECTED)


class Watched:
    """A run's state with a clock to turn, and the records that it wrote."""

    def __init__(
        self,
        experiment: Experiment | None = None,
        steps_per_epoch: int = 0,
        schedule: ExchangeSchedule = EVERY_STEP,
    ) -> None:
        self.clock, self.wall = Clock(), Clock(1.7e9)
        self.records: list[Record] = []
        self.experiment = experiment or make_experiment(NAMES)
        self.run_state = RunState(self.experiment, self.records.append, self.clock, self.wall)
        self.run_state.steps_per_epoch, self.run_state.schedule = steps_per_epoch, schedule

    def close(self, number: int, *, took: float = 1.0, **after: float) -> None:
        """Close a round `took` seconds on; `after` says how long after its beginning each participant came."""
        began = self.clock.now
        self.clock.now += took
        self.run_state.record_round(number, {name: began + after.get(name, 0.0) for name in self.experiment.names})

    @property
    def spans(self) -> list[RoundsClosed]:
        return [record for record in self.records if isinstance(record, RoundsClosed)]

    def snapshot(self, waiting: Waiting | None = None, frontier: int = 3) -> pb.Run:
        names = self.experiment.participants
        return self.run_state.snapshot(dict.fromkeys(names, ParticipantState.CONNECTED), names, frontier, waiting)


class TestEvents:
    def test_they_are_written_down_and_shown(self) -> None:
        watched = Watched()
        watched.run_state.record_event(pb.EVENT_KIND_FAILED, "ant", "out of memory")
        expected = Happened(time=1.7e9, what="failed", participant="ant", message="out of memory")
        assert watched.records == [expected]
        (shown,) = watched.snapshot().events
        assert shown == pb.Event(
            time=Timestamp(seconds=1_700_000_000),
            kind=pb.EVENT_KIND_FAILED,
            participant="ant",
            message="out of memory",
        )

    def test_only_the_last_are_kept(self) -> None:
        watched = Watched()
        for number in range(500):
            watched.run_state.record_event(pb.EVENT_KIND_JOINED, message=str(number))
        assert [event.message for event in watched.snapshot().events] == [str(number) for number in range(300, 500)]
        assert len(watched.records) == 500

    def test_who_is_skipped_and_awaited_again(self) -> None:
        watched = Watched()
        watched.run_state.record_skipped("bee", 3, "its deadline is over")
        watched.run_state.participants["bee"].missed_rounds = 4
        watched.run_state.record_awaited("bee", 7)
        watched.run_state.record_awaited("cat", 7)
        assert [(event.kind, event.participant, event.message) for event in watched.snapshot().events] == [
            (pb.EVENT_KIND_SKIPPED, "bee", "skipped from round 3 on: its deadline is over"),
            (
                pb.EVENT_KIND_AWAITED,
                "bee",
                "awaited from round 7 on; it missed rounds from 3 on, 4 rounds missed in all",
            ),
            (pb.EVENT_KIND_AWAITED, "cat", "awaited from round 7 on, 0 rounds missed in all"),
        ]
        assert [record.what for record in watched.records if isinstance(record, Happened)] == [
            "skipped",
            "awaited",
            "awaited",
        ]

    def test_only_the_first_of_neighbouring_rounds_without_targets_is_told(self) -> None:
        watched = Watched()
        for number, targets in enumerate((False, False, True, False)):
            watched.run_state.record_round(number, {"ant": 1.0}, ("bee",), targets=targets, why="below the quorum")
        assert [(event.kind, event.message) for event in watched.snapshot().events] == [
            (pb.EVENT_KIND_BELOW_QUORUM, "round 0 closed with 1 contributions, below the quorum: no targets"),
            (pb.EVENT_KIND_BELOW_QUORUM, "round 3 closed with 1 contributions, below the quorum: no targets"),
        ]
        assert watched.run_state.rounds_without_targets == 3
        assert [status.missed_rounds for status in watched.snapshot().participants] == [0, 4, 0]


class TestRefusals:
    def test_the_first_are_told_one_by_one(self) -> None:
        watched = Watched()
        for number in range(20):
            watched.run_state.record_rejection(pb.EVENT_KIND_REFUSED, "ant", f"reason {number}")
        assert [event.message for event in watched.snapshot().events] == [f"reason {number}" for number in range(20)]

    def test_many_become_a_line_a_minute_that_counts_them(self) -> None:
        watched = Watched()
        for _ in range(6000):
            watched.run_state.record_rejection(pb.EVENT_KIND_REFUSED, "", "no such participant")
            watched.clock.now += 0.1
        messages = [event.message for event in watched.snapshot().events]
        assert 25 <= len(messages) == len(watched.records) <= 30
        assert messages[-1] == "no such participant (and 599 more before it)"
        watched.run_state.flush()
        last = watched.snapshot().events[-1]
        assert (last.kind, last.participant) == (pb.EVENT_KIND_REFUSED, "")
        told = sum(1 + int(each.partition("(and ")[2].partition(" ")[0] or 0) for each in messages)
        assert told + int(last.message.removesuffix(" more")) == 6000
        watched.run_state.flush()
        assert watched.snapshot().events[-1] == last, "it is told once"

    def test_each_participant_and_each_kind_has_its_own(self) -> None:
        watched = Watched()
        for _ in range(100):
            watched.run_state.record_rejection(pb.EVENT_KIND_REFUSED, "ant", "no")
        watched.run_state.record_rejection(pb.EVENT_KIND_REFUSED, "bee", "its own")
        watched.run_state.record_rejection(pb.EVENT_KIND_REJECTED, "ant", "another kind")
        watched.run_state.record_event(pb.EVENT_KIND_JOINED, "ant", "no refusal")
        assert [event.message for event in watched.snapshot().events[-3:]] == ["its own", "another kind", "no refusal"]


class TestParticipants:
    def test_a_join_tells_of_model_and_device(self) -> None:
        watched = Watched(steps_per_epoch=4)
        request = pb.JoinRequest(
            participant="bee",
            first_round=5,
            total_rounds=20,
            steps_trained=10,
            total_steps=40,
            parameters=1234,
            device="cuda:0 (NVIDIA H100)",
        )
        watched.run_state.record_join(request)
        assert watched.records == [
            Joined(
                time=1.7e9,
                participant="bee",
                model="mlp",
                parameters=1234,
                device="cuda:0 (NVIDIA H100)",
                total_rounds=20,
                total_steps=40,
            )
        ]
        bee = watched.snapshot().participants[1]
        assert (bee.parameters, bee.device, bee.joins) == (1234, "cuda:0 (NVIDIA H100)", 1)
        assert (bee.round, bee.steps_trained, bee.epochs_trained) == (5, 10, 2.5)

    def test_a_report_is_shown_and_written(self) -> None:
        watched = Watched(steps_per_epoch=4)
        train = pb.Measurement(split=pb.SPLIT_TRAIN, steps_trained=8, accuracy=0.75, loss=1.0, distillation_loss=0.0)
        test = pb.Measurement(split=pb.SPLIT_TEST, steps_trained=8, accuracy=0.5, loss=2.0)
        watched.run_state.record_report(
            "ant",
            pb.ReportRequest(
                session_id=9,
                steps_trained=9,
                epochs_trained=2.25,
                round=4,
                durable_round=3,
                measurements=[test, train],
                step_time=duration(0.5),
                wait_time=duration(0.25),
            ),
        )
        ant = watched.snapshot().participants[0]
        assert (ant.steps_trained, ant.epochs_trained, ant.round, ant.durable_round) == (9, 2.25, 4, 3)
        assert (seconds(ant.step_time), seconds(ant.wait_time)) == (0.5, 0.25)
        assert list(ant.measurements) == [train, test]
        assert watched.records == [
            Paced(time=1.7e9, participant="ant", steps_trained=9, step_seconds=0.5, wait_seconds=0.25),
            Measured(
                time=1.7e9,
                participant="ant",
                split="test",
                steps_trained=8,
                epochs_trained=2.0,
                accuracy=0.5,
                loss=2.0,
            ),
            Measured(
                time=1.7e9,
                participant="ant",
                split="train",
                steps_trained=8,
                epochs_trained=2.0,
                accuracy=0.75,
                loss=1.0,
                distillation_loss=0.0,
            ),
        ]

    def test_the_latest_measurement_of_a_split_stands(self) -> None:
        watched = Watched()
        for number in (1, 2):
            measured = pb.Measurement(split=pb.SPLIT_TEST, steps_trained=number, accuracy=number / 4)
            watched.run_state.record_report("ant", pb.ReportRequest(steps_trained=number, measurements=[measured]))
        (shown,) = watched.snapshot().participants[0].measurements
        assert shown.steps_trained == 2

    def test_an_unknown_pace_leaves_the_known_one(self) -> None:
        watched = Watched()
        first = pb.ReportRequest(steps_trained=1, step_time=duration(0.5), wait_time=duration(0.125))
        watched.run_state.record_report("ant", first)
        watched.run_state.record_report("ant", pb.ReportRequest(steps_trained=2))
        ant = watched.snapshot().participants[0]
        assert (ant.steps_trained, seconds(ant.step_time), seconds(ant.wait_time)) == (2, 0.5, 0.125)
        assert [type(record) for record in watched.records] == [Paced]

    def test_a_report_copies_what_both_messages_have(self) -> None:
        """A field that is added to both under one name is shown without a change here."""
        both = {*pb.ReportRequest.DESCRIPTOR.fields_by_name} & {*pb.ParticipantStatus.DESCRIPTOR.fields_by_name}
        watched = Watched()
        report = pb.ReportRequest(
            steps_trained=4,
            epochs_trained=0.5,
            round=3,
            durable_round=2,
            measurements=[pb.Measurement(split=pb.SPLIT_TEST, accuracy=0.5)],
            step_time=duration(2),
            wait_time=duration(1),
        )
        assert both == {field.name for field, _ in report.ListFields()}
        watched.run_state.record_report("ant", report)
        ant = watched.snapshot().participants[0]
        assert [getattr(ant, name) for name in sorted(both)] == [getattr(report, name) for name in sorted(both)]


class TestSpans:
    def test_one_is_written_at_each_epochs_end(self) -> None:
        watched = Watched(steps_per_epoch=3)
        for number in range(7):
            watched.close(number)
        assert [(span.first, span.last) for span in watched.spans] == [(0, 2), (3, 5)]
        watched.run_state.flush()
        assert [(span.first, span.last) for span in watched.spans] == [(0, 2), (3, 5), (6, 6)]
        assert [span.steps_trained for span in watched.spans] == [3, 6, 7]
        watched.run_state.flush()
        assert len(watched.spans) == 3

    @pytest.mark.parametrize(
        ("schedule", "spans"),
        [
            (ExchangeSchedule(start=0, every=2), [(0, 2, 5), (3, 4, 9), (5, 7, 15)]),
            (ExchangeSchedule(start=4, every=3), [(0, 0, 5), (1, 1, 8), (2, 3, 14)]),
            (ExchangeSchedule(start=0, every=7), [(0, 0, 1), (1, 1, 8), (2, 2, 15)]),
        ],
    )
    def test_where_some_steps_exchange_an_epoch_ends_before_the_first_round_of_the_next(
        self, schedule: ExchangeSchedule, spans: list[tuple[int, int, int]]
    ) -> None:
        watched = Watched(steps_per_epoch=5, schedule=schedule)
        for number in range(spans[-1][1] + 1):
            watched.close(number)
        assert [(span.first, span.last, span.steps_trained) for span in watched.spans] == spans

    def test_an_epoch_that_takes_long_has_several(self) -> None:
        watched = Watched(steps_per_epoch=1000)
        for number in range(12):
            watched.close(number, took=6.0)
        assert [(span.first, span.last) for span in watched.spans] == [(0, 4), (5, 9)]

    def test_spans_join_without_a_gap(self) -> None:
        watched = Watched(steps_per_epoch=2)
        for number, took in enumerate([1.0, 2.0, 4.0, 8.0]):
            watched.close(number, took=took)
        assert [span.seconds for span in watched.spans] == [3.0, 12.0]

    def test_waits_are_laid_to_the_last(self) -> None:
        """For as long as it was the only one missing: what it came after the one before it."""
        watched = Watched(steps_per_epoch=4)
        watched.close(0, ant=0.0, bee=0.25, cat=0.5)
        watched.close(1, ant=0.0, bee=0.0, cat=1.0)
        watched.close(2, ant=0.5, bee=0.125, cat=0.0)
        watched.close(3, ant=0.0, bee=0.0, cat=0.75)
        (span,) = watched.spans
        assert span.waits == {
            "cat": ParticipantWait(rounds=3, seconds=0.25 + 1.0 + 0.75),
            "ant": ParticipantWait(rounds=1, seconds=0.375),
        }
        assert (span.wait_p50, span.wait_max) == (0.75, 1.0)

    @given(
        st.lists(
            st.tuples(*[st.integers(0, 64).map(lambda value: value / 64) for _ in NAMES]), min_size=1, max_size=20
        ),
        st.integers(1, 6),
    )
    def test_every_round_is_in_one_span_and_waited_for_one_participant(
        self, courses: list[tuple[float, float, float]], per_epoch: int
    ) -> None:
        watched = Watched(steps_per_epoch=per_epoch)
        for number, course in enumerate(courses):
            watched.close(number, **dict(zip(NAMES, course, strict=True)))
        watched.run_state.flush()
        covered = [number for span in watched.spans for number in range(span.first, span.last + 1)]
        assert covered == list(range(len(courses)))
        for span in watched.spans:
            assert sum(wait.rounds for wait in span.waits.values()) == span.last - span.first + 1
            assert 0 <= span.wait_p50 <= span.wait_max
            waited = sum(wait.seconds for wait in span.waits.values())
            assert waited <= sum(max(each) - min(each) for each in courses[span.first : span.last + 1])

    def test_each_round_but_the_first_is_told_to_whoever_wants_to_know(self) -> None:
        watched = Watched()
        told: list[tuple[float, float]] = []
        watched.run_state.on_round = lambda wait, seconds: told.append((wait, seconds))
        for number in range(3):
            watched.close(number, took=2.0, bee=0.5)
        assert told == [(0.5, 2.0), (0.5, 2.0)]


class TestAgreement:
    def test_it_is_shown_and_written_with_the_spans(self) -> None:
        watched = Watched(steps_per_epoch=1)
        votes = torch.tensor([[0, 1, 2, 0], [0, 1, 1, 1], [0, 2, 2, 0]])
        logits = 5 * torch.nn.functional.one_hot(votes, 3).float()
        watched.run_state.measure_agreement(0, NAMES, logits, torch.tensor([0, 1, 2, 1]))
        state = watched.snapshot()
        assert state.ensemble_accuracy == 0.75
        assert [(pair.first, pair.second, pair.ratio) for pair in state.disagreements] == [
            ("ant", "bee", 0.5),
            ("ant", "cat", 0.25),
            ("bee", "cat", 0.75),
        ]
        watched.close(0)
        (span,) = watched.spans
        assert span.ensemble_accuracy == 0.75
        assert span.disagreement == {"ant|bee": 0.5, "ant|cat": 0.25, "bee|cat": 0.75}

    def test_it_does_not_depend_on_the_clock(self) -> None:
        """Whether a round takes a microsecond or an hour, the same rounds are measured."""
        votes = torch.tensor([[0, 1, 2, 0], [0, 1, 1, 1], [0, 2, 2, 0]])
        found: list[tuple[float, list[pb.Disagreement]]] = []
        for took in (1e-6, 3600.0):
            watched = Watched(steps_per_epoch=5)
            for number in range(12):
                watched.clock.now += took
                right = 5 * torch.nn.functional.one_hot(votes[:1].expand(3, -1) if number % 3 else votes, 3).float()
                watched.run_state.measure_agreement(number, NAMES, right, votes[0])
            state = watched.snapshot()
            found.append((state.ensemble_accuracy, list(state.disagreements)))
        assert found[0] == found[1]
        assert [pair.ratio for pair in found[0][1]] == [0.5 * 1 / 5, 0.25 * 1 / 5, 0.75 * 1 / 5], "of rounds 7 to 11"

    def test_it_is_of_one_epochs_rounds_where_some_steps_exchange(self) -> None:
        votes = torch.tensor([[0, 1, 2, 0], [0, 1, 1, 1], [0, 2, 2, 0]])
        logits = 5 * torch.nn.functional.one_hot(votes, 3).float()
        watched = Watched(steps_per_epoch=5, schedule=ExchangeSchedule(every=2))
        watched.run_state.measure_agreement(0, NAMES, logits, votes[0])
        agreed: list[float] = []
        for number in range(1, 4):  # an epoch has three rounds
            watched.run_state.measure_agreement(number, NAMES, logits[:1].expand(3, -1, -1), votes[0])
            agreed.append(watched.snapshot().disagreements[0].ratio)
        assert agreed == [0.25, 0.5 / 3, 0.0]

    def test_it_is_unknown_before(self) -> None:
        state = Watched().snapshot()
        assert not state.HasField("ensemble_accuracy")
        assert list(state.disagreements) == []


class TestRate:
    def test_it_is_that_of_the_last_rounds(self) -> None:
        watched = Watched()
        assert watched.run_state.rounds_per_second() == 0.0
        for number in range(100):
            watched.close(number, took=2.0)
        assert watched.run_state.rounds_per_second() == pytest.approx(0.5)
        for number in range(100, 2000):
            watched.close(number, took=0.01)
        assert watched.run_state.rounds_per_second() == pytest.approx(100, rel=0.05)

    def test_it_sinks_while_nothing_closes(self) -> None:
        watched = Watched()
        for number in range(10):
            watched.close(number)
        watched.clock.now += 1000
        assert watched.run_state.rounds_per_second() < 0.01


class TestSnapshot:
    def test_of_a_run_that_exchanges(self) -> None:
        watched = Watched(schedule=ExchangeSchedule(start=1, every=2))
        watched.run_state.total_rounds, watched.run_state.total_steps = 6, 12
        watched.clock.now += 7
        state = watched.snapshot(Waiting(3, ("bee",), 1.5))
        assert (state.name, state.method) == ("small", "kdcl/min_logit")
        assert state.experiment_sha256 == identity_sha256(watched.experiment)
        assert (state.frontier, state.total_rounds, state.steps_trained, state.total_steps) == (3, 6, 7, 12)
        assert (list(state.waiting_for), seconds(state.waiting_time)) == (["bee"], 1.5)
        assert [(each.name, each.role) for each in state.participants] == [(name, pb.ROLE_STUDENT) for name in NAMES]
        assert seconds(state.uptime) == 7

    def test_a_complete_run_has_all_its_steps_behind_it(self) -> None:
        """Also those after its last round."""
        watched = Watched(schedule=ExchangeSchedule(start=1, every=4))
        watched.run_state.total_rounds, watched.run_state.total_steps = 3, 11  # rounds at steps 1, 5 and 9
        for name in NAMES:
            watched.run_state.record_report(name, pb.ReportRequest(steps_trained=1))
        assert [watched.snapshot(frontier=number).steps_trained for number in range(4)] == [1, 5, 9, 11]

    def test_of_a_run_that_exchanges_nothing_the_slowest_students_steps_count(self) -> None:
        watched = Watched(make_experiment(NAMES).replace(distillation=Independent()))
        for name, number in zip(NAMES, (8, 5, 6), strict=True):
            watched.run_state.record_report(name, pb.ReportRequest(steps_trained=number))
        state = watched.snapshot(frontier=0)
        assert (state.frontier, state.total_rounds, state.steps_trained) == (0, 0, 5)

    def test_a_teacher_comes_after_the_students(self) -> None:
        experiment = make_experiment(
            teachers=[{"name": "old", "model": "cnn", "weights": "old.pt"}], distillation={"method": "kd"}
        )
        shown = [(each.name, each.role, each.model) for each in Watched(experiment).snapshot().participants]
        assert shown == [
            ("ant", pb.ROLE_STUDENT, "mlp"),
            ("bee", pb.ROLE_STUDENT, "mlp"),
            ("old", pb.ROLE_TEACHER, "cnn"),
        ]

    @pytest.mark.parametrize("state", ParticipantState)
    def test_every_state_has_its_value(self, state: ParticipantState) -> None:
        run = Watched().run_state.snapshot({**EVERYBODY, "bee": state}, NAMES, 0, None)
        assert pb.ParticipantState.Name(run.participants[1].state) == f"PARTICIPANT_STATE_{state.name}"
        assert not run.complete

    def test_who_is_awaited(self) -> None:
        run = Watched().run_state.snapshot({**EVERYBODY}, {"ant", "cat"}, 0, None)
        assert [status.awaited for status in run.participants] == [True, False, True]

    def test_complete_when_all_have_finished(self) -> None:
        finished: dict[str, ParticipantState] = dict.fromkeys(NAMES, ParticipantState.FINISHED)
        assert Watched().run_state.snapshot(finished, (), 0, None).complete


def test_rejections_are_counted_by_reason() -> None:
    watched = Watched()
    for status in (Status.INVALID_ARGUMENT, Status.ABORTED, Status.INVALID_ARGUMENT):
        watched.run_state.count_rejection(status)
    assert watched.run_state.rejected == {Status.ABORTED: 1, Status.FAILED_PRECONDITION: 0, Status.INVALID_ARGUMENT: 2}
