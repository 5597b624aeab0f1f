from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from codistill.config.experiment import Experiment
from codistill.config.methods import Independent
from codistill.rundir.records import Happened, Joined, Measured, Paced, Record, RoundsClosed, StudentWait
from codistill.v1 import distillation_pb2 as pb
from codistill_server.observability.state import RunState
from codistill_server.rounds.actions import Status, Waiting
from codistill_server.rounds.machine import Presence
from server.support import TOTAL_ROUNDS, Clock, join_request, make_experiment

NAMES = ("ant", "bee", "cat")
EVERYBODY = dict.fromkeys(NAMES, Presence.PRESENT)


class Watched:
    """A run's state with a clock to turn, and the records that it wrote."""

    def __init__(self, experiment: Experiment | None = None, rounds_per_epoch: int = 0) -> None:
        self.clock, self.wall = Clock(), Clock(1.7e9)
        self.records: list[Record] = []
        self.experiment = experiment or make_experiment(NAMES)
        self.run_state = RunState(self.experiment, self.records.append, self.clock, self.wall)
        self.run_state.rounds_per_epoch = rounds_per_epoch

    def close(self, number: int, *, took: float = 1.0, **after: float) -> None:
        """Close a round `took` seconds on; `after` says how long after its beginning each student came."""
        began = self.clock.now
        self.clock.now += took
        self.run_state.record_round(number, {name: began + after.get(name, 0.0) for name in self.experiment.names})

    @property
    def spans(self) -> list[RoundsClosed]:
        return [record for record in self.records if isinstance(record, RoundsClosed)]

    def snapshot(self, waiting: Waiting | None = None) -> pb.Run:
        return self.run_state.snapshot(dict.fromkeys(self.experiment.names, Presence.PRESENT), 3, waiting)


class TestEvents:
    def test_they_are_written_down_and_shown(self) -> None:
        watched = Watched()
        watched.run_state.record_event("failed", "ant", "out of memory")
        expected = Happened(time=1.7e9, what="failed", student="ant", message="out of memory")
        assert watched.records == [expected]
        (shown,) = watched.snapshot().events
        assert shown == pb.Event(unix_seconds=1.7e9, kind="failed", student="ant", message="out of memory")

    def test_only_the_last_are_kept(self) -> None:
        watched = Watched()
        for number in range(500):
            watched.run_state.record_event("joined", message=str(number))
        assert [event.message for event in watched.snapshot().events] == [str(number) for number in range(300, 500)]
        assert len(watched.records) == 500


class TestRefusals:
    def test_the_first_are_told_one_by_one(self) -> None:
        watched = Watched()
        for number in range(20):
            watched.run_state.record_rejection("refused", "ant", f"reason {number}")
        assert [event.message for event in watched.snapshot().events] == [f"reason {number}" for number in range(20)]

    def test_many_become_a_line_a_minute_that_counts_them(self) -> None:
        watched = Watched()
        for _ in range(6000):
            watched.run_state.record_rejection("refused", "", "no such student")
            watched.clock.now += 0.1
        messages = [event.message for event in watched.snapshot().events]
        assert 25 <= len(messages) == len(watched.records) <= 30
        assert messages[-1] == "no such student (and 599 more before it)"
        watched.run_state.flush()
        last = watched.snapshot().events[-1]
        assert (last.kind, last.student) == ("refused", "")
        told = sum(1 + int(each.partition("(and ")[2].partition(" ")[0] or 0) for each in messages)
        assert told + int(last.message.removesuffix(" more")) == 6000
        watched.run_state.flush()
        assert watched.snapshot().events[-1] == last, "it is told once"

    def test_each_student_and_each_kind_has_its_own(self) -> None:
        watched = Watched()
        for _ in range(100):
            watched.run_state.record_rejection("refused", "ant", "no")
        watched.run_state.record_rejection("refused", "bee", "its own")
        watched.run_state.record_rejection("rejected", "ant", "another kind")
        watched.run_state.record_event("joined", "ant", "no refusal")
        assert [event.message for event in watched.snapshot().events[-3:]] == ["its own", "another kind", "no refusal"]


class TestStudents:
    def test_a_join_tells_of_model_and_device(self) -> None:
        watched = Watched(rounds_per_epoch=4)
        watched.run_state.record_join(
            join_request(watched.experiment, "bee", 5, device="cuda:0 (NVIDIA H100)", parameters=1234)
        )
        assert watched.records == [
            Joined(
                time=1.7e9,
                student="bee",
                model="mlp",
                parameters=1234,
                device="cuda:0 (NVIDIA H100)",
                total_rounds=TOTAL_ROUNDS,
            )
        ]
        bee = watched.snapshot().students[1]
        assert (bee.parameters, bee.device, bee.round, bee.epoch) == (1234, "cuda:0 (NVIDIA H100)", 5, 1.25)

    def test_a_report_is_shown_and_written(self) -> None:
        watched = Watched(rounds_per_epoch=4)
        train = pb.Measurement(split=pb.SPLIT_TRAIN, round=8, accuracy=0.75, loss=1.0, distillation_loss=0.0)
        test = pb.Measurement(split=pb.SPLIT_TEST, round=8, accuracy=0.5, loss=2.0)
        watched.run_state.record_report(
            "ant",
            pb.ReportRequest(
                round=9, epoch=2.25, durable_round=7, measurements=[test, train], step_seconds=0.5, wait_seconds=0.25
            ),
        )
        ant = watched.snapshot().students[0]
        assert (ant.round, ant.epoch, ant.durable_round) == (9, 2.25, 7)
        assert list(ant.measurements) == [train, test]
        assert watched.records == [
            Paced(time=1.7e9, student="ant", round=9, step_seconds=0.5, wait_seconds=0.25),
            Measured(time=1.7e9, student="ant", split="test", round=8, epoch=2.0, accuracy=0.5, loss=2.0),
            Measured(
                time=1.7e9,
                student="ant",
                split="train",
                round=8,
                epoch=2.0,
                accuracy=0.75,
                loss=1.0,
                distillation_loss=0.0,
            ),
        ]

    def test_the_latest_measurement_of_a_split_stands(self) -> None:
        watched = Watched()
        for number in (1, 2):
            measured = pb.Measurement(split=pb.SPLIT_TEST, round=number, accuracy=number / 4)
            watched.run_state.record_report("ant", pb.ReportRequest(round=number, measurements=[measured]))
        (shown,) = watched.snapshot().students[0].measurements
        assert shown.round == 2

    def test_an_unknown_pace_leaves_the_known_one(self) -> None:
        watched = Watched()
        watched.run_state.record_report("ant", pb.ReportRequest(step_seconds=0.5, wait_seconds=0.1))
        watched.run_state.record_report("ant", pb.ReportRequest(round=1))
        assert watched.snapshot().students[0].step_seconds == 0.5
        assert [type(record) for record in watched.records] == [Paced]


class TestSpans:
    def test_one_is_written_at_each_epochs_end(self) -> None:
        watched = Watched(rounds_per_epoch=3)
        for number in range(7):
            watched.close(number)
        assert [(span.first, span.last) for span in watched.spans] == [(0, 2), (3, 5)]
        watched.run_state.flush()
        assert [(span.first, span.last) for span in watched.spans] == [(0, 2), (3, 5), (6, 6)]
        watched.run_state.flush()
        assert len(watched.spans) == 3

    def test_an_epoch_that_takes_long_has_several(self) -> None:
        watched = Watched(rounds_per_epoch=1000)
        for number in range(12):
            watched.close(number, took=6.0)
        assert [(span.first, span.last) for span in watched.spans] == [(0, 4), (5, 9)]

    def test_spans_join_without_a_gap(self) -> None:
        watched = Watched(rounds_per_epoch=2)
        for number, took in enumerate([1.0, 2.0, 4.0, 8.0]):
            watched.close(number, took=took)
        assert [span.seconds for span in watched.spans] == [3.0, 12.0]

    def test_waits_are_laid_to_the_last(self) -> None:
        """For as long as it was the only one missing: what it came after the one before it."""
        watched = Watched(rounds_per_epoch=4)
        watched.close(0, ant=0.0, bee=0.25, cat=0.5)
        watched.close(1, ant=0.0, bee=0.0, cat=1.0)
        watched.close(2, ant=0.5, bee=0.125, cat=0.0)
        watched.close(3, ant=0.0, bee=0.0, cat=0.75)
        (span,) = watched.spans
        assert span.waits == {
            "cat": StudentWait(rounds=3, seconds=0.25 + 1.0 + 0.75),
            "ant": StudentWait(rounds=1, seconds=0.375),
        }
        assert (span.wait_p50, span.wait_max) == (0.75, 1.0)

    @given(
        st.lists(
            st.tuples(*[st.integers(0, 64).map(lambda value: value / 64) for _ in NAMES]), min_size=1, max_size=20
        ),
        st.integers(1, 6),
    )
    def test_every_round_is_in_one_span_and_waited_for_one_student(
        self, courses: list[tuple[float, float, float]], per_epoch: int
    ) -> None:
        watched = Watched(rounds_per_epoch=per_epoch)
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
        watched = Watched(rounds_per_epoch=1)
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
            watched = Watched(rounds_per_epoch=5)
            for number in range(12):
                watched.clock.now += took
                right = 5 * torch.nn.functional.one_hot(votes[:1].expand(3, -1) if number % 3 else votes, 3).float()
                watched.run_state.measure_agreement(number, NAMES, right, votes[0])
            state = watched.snapshot()
            found.append((state.ensemble_accuracy, list(state.disagreements)))
        assert found[0] == found[1]
        assert [pair.ratio for pair in found[0][1]] == [0.5 * 1 / 5, 0.25 * 1 / 5, 0.75 * 1 / 5], "of rounds 7 to 11"

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
        watched = Watched()
        watched.clock.now += 7
        state = watched.snapshot(Waiting(3, ("bee",), 1.5))
        assert (state.name, state.method, state.frontier) == ("small", "kdcl/min_logit", 3)
        assert (list(state.waiting_for), state.waiting_seconds) == (["bee"], 1.5)
        assert [student.name for student in state.students] == list(NAMES)
        assert state.uptime_seconds == 7

    def test_of_a_run_that_does_not_the_slowest_student_is_the_frontier(self) -> None:
        watched = Watched(make_experiment(NAMES).replace(distillation=Independent()))
        for name, number in zip(NAMES, (8, 5, 6), strict=True):
            watched.run_state.record_report(name, pb.ReportRequest(round=number))
        assert watched.snapshot().frontier == 5

    @pytest.mark.parametrize("presence", Presence)
    def test_every_presence_has_its_state(self, presence: Presence) -> None:
        watched = Watched()
        state = watched.run_state.snapshot({**EVERYBODY, "bee": presence}, 0, None)
        assert pb.StudentState.Name(state.students[1].state) == f"STUDENT_STATE_{presence.name}"
        assert not state.complete

    def test_complete_when_all_have_finished(self) -> None:
        assert Watched().run_state.snapshot(dict.fromkeys(NAMES, Presence.FINISHED), 0, None).complete


def test_rejections_are_counted_by_reason() -> None:
    watched = Watched()
    for status in (Status.INVALID_ARGUMENT, Status.ABORTED, Status.INVALID_ARGUMENT):
        watched.run_state.count_rejection(status)
    assert watched.run_state.rejected == {Status.ABORTED: 1, Status.FAILED_PRECONDITION: 0, Status.INVALID_ARGUMENT: 2}
