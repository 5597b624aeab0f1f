"""The state of a run, as status, metrics, reports and the live table show it.

The coordinator keeps :class:`RunState` up to date. Nothing in here has any effect on training.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch

from codistill.config.experiment import Experiment
from codistill.rundir.records import Happened, Joined, Measured, Paced, Record
from codistill.v1 import distillation_pb2 as pb
from codistill_server.observability.agreement import Agreement
from codistill_server.observability.span import Span
from codistill_server.ratelimit import Rate, TokenBuckets
from codistill_server.rounds.actions import Status, Waiting
from codistill_server.rounds.machine import Presence

__all__ = ["RunState"]

_EVENTS = 200
_RATE_MARKS = 20
_RATE_INTERVAL = 0.5
_SPAN_SECONDS = 30.0
_REJECTIONS = Rate(20, 1 / 60)  # events of a kind and a student: a stranger's calls must not fill the disk

# A number that a report and a status both have by one name is shown as last reported.
_REPORTED = {
    field.name: field
    for field in pb.ReportRequest.DESCRIPTOR.fields
    if field.name in pb.StudentStatus.DESCRIPTOR.fields_by_name and field.message_type is None
}
_SPLITS: Mapping[pb.Split.ValueType, Literal["train", "test"]] = {pb.SPLIT_TRAIN: "train", pb.SPLIT_TEST: "test"}
_STATES: Mapping[Presence, pb.StudentState.ValueType] = {
    Presence.EXPECTED: pb.STUDENT_STATE_EXPECTED,
    Presence.PRESENT: pb.STUDENT_STATE_PRESENT,
    Presence.ABSENT: pb.STUDENT_STATE_ABSENT,
    Presence.FINISHED: pb.STUDENT_STATE_FINISHED,
    Presence.FAILED: pb.STUDENT_STATE_FAILED,
}


class RunState:
    """The state of one run.

    Args:
        experiment: the run's.
        record: called with each record to be written.
        clock: monotonic time in seconds.
        wall: seconds since 1970, for records.

    Attributes:
        students: the status of each student and teacher, by name; :meth:`snapshot` sets its `state`.
        on_round: called with each round's wait and its time since the round before, in seconds; not for the first.
    """

    def __init__(
        self,
        experiment: Experiment,
        record: Callable[[Record], None],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.name = experiment.name
        self.method = experiment.distillation.title
        self.exchanges = experiment.distillation.exchanges
        self.students = {spec.name: pb.StudentStatus(name=spec.name, model=spec.model) for spec in experiment.students}
        for spec in experiment.teachers:
            self.students[spec.name] = pb.StudentStatus(name=spec.name, model=spec.model, teacher=True)
        self.total_rounds = 0
        self.rounds_per_epoch = 0
        self.closed_rounds = 0
        self.rounds_without_targets = 0
        # From 0 on, so that the first of a kind shows as a rise.
        self.rejected: dict[Status, int] = {status: 0 for status in Status if status is not Status.SUPERSEDED}
        self.bytes_in = 0
        self.bytes_out = 0
        self.on_round: Callable[[float, float], None] = _ignore
        self._record = record
        self._clock = clock
        self._wall = wall
        self._started = clock()
        self._events: deque[Happened] = deque(maxlen=_EVENTS)
        self._rejections = TokenBuckets(_REJECTIONS)
        self._suppressed: Counter[tuple[str, str]] = Counter()
        self._marks: deque[tuple[float, int]] = deque(maxlen=_RATE_MARKS)
        self._last_closing: float | None = None
        self._last_without_targets = -2
        self._absent_since: dict[str, int] = {}
        self._span: Span | None = None
        self._agreement = Agreement()

    def record_event(self, what: str, student: str = "", message: str = "") -> None:
        """Record an event."""
        happened = Happened(time=self._wall(), what=what, student=student, message=message)
        self._events.append(happened)
        self._record(happened)

    def record_rejection(self, what: str, student: str, message: str) -> None:
        """Record a rejected call as an event; of many, record one a minute that counts the others."""
        if self._rejections.take(f"{what} {student}", self._clock()):
            self._suppressed[what, student] += 1
            return
        others = self._suppressed.pop((what, student), 0)
        self.record_event(what, student, f"{message} (and {others} more before it)" if others else message)

    def record_join(self, request: pb.JoinRequest) -> None:
        """Record that a student or teacher joined."""
        status = self.students[request.student]
        status.parameters, status.device = request.parameters, request.device
        status.round, status.epoch = request.first_round, self._epoch(request.first_round)
        status.joins += 1
        self._record(
            Joined(
                time=self._wall(),
                student=status.name,
                model=status.model,
                parameters=status.parameters,
                device=status.device,
                total_rounds=request.total_rounds,
            )
        )

    def record_report(self, student: str, report: pb.ReportRequest) -> None:
        """Record the progress that a student or teacher reports."""
        status = self.students[student]
        given = {field.name for field, _ in report.ListFields()}
        unknown = {name for name, field in _REPORTED.items() if field.has_presence and name not in given}
        if not report.step_seconds > 0:
            unknown |= {"step_seconds", "wait_seconds"}
        for name in _REPORTED.keys() - unknown:
            setattr(status, name, getattr(report, name))
        if report.step_seconds > 0:
            self._record(
                Paced(
                    time=self._wall(),
                    student=student,
                    round=report.round,
                    step_seconds=report.step_seconds,
                    wait_seconds=report.wait_seconds,
                )
            )
        latest = {measurement.split: measurement for measurement in (*status.measurements, *report.measurements)}
        status.ClearField("measurements")
        status.measurements.extend(latest[split] for split in _SPLITS if split in latest)
        for measurement in report.measurements:
            self._record(
                Measured(
                    time=self._wall(),
                    student=student,
                    split=_SPLITS[measurement.split],
                    round=measurement.round,
                    epoch=self._epoch(measurement.round),
                    accuracy=measurement.accuracy,
                    loss=measurement.loss,
                    distillation_loss=measurement.distillation_loss
                    if measurement.HasField("distillation_loss")
                    else None,
                )
            )

    def count_rejection(self, status: Status) -> None:
        """Count a contribution that was rejected."""
        self.rejected[status] = self.rejected.get(status, 0) + 1

    def record_absence(self, student: str, round_number: int, reason: str) -> None:
        """Record that the frontier no longer waits for a student."""
        self._absent_since[student] = round_number
        self.record_event("absent", student, f"absent from round {round_number} on: {reason}")

    def record_return(self, student: str, round_number: int) -> None:
        """Record that the frontier waits for a student again."""
        since = self._absent_since.pop(student, round_number)
        missed = f"; it missed rounds from {since} on" if since < round_number else ""
        in_all = self.students[student].missed_rounds
        self.record_event("returned", student, f"back at round {round_number}{missed}, {in_all} rounds missed in all")

    def record_round(
        self,
        round_number: int,
        arrived: Mapping[str, float],
        missing: Sequence[str] = (),
        *,
        targets: bool = True,
        why: str = "below the quorum",
    ) -> None:
        """Record a closed round.

        Args:
            round_number: the round's.
            arrived: when each contribution arrived, by student.
            missing: the students without a contribution.
            targets: whether the round had any.
            why: the reason, if it had none.
        """
        now = self._clock()
        if self._span is None:
            first_arrival = min(arrived.values())
            self._span = Span(round_number, first_arrival if self._last_closing is None else self._last_closing)
        span = self._span
        wait = span.add(round_number, arrived, missing, targets=targets)
        for name in missing:
            self.students[name].missed_rounds += 1
        if not targets:
            self._closed_without_targets(round_number, len(arrived), why)
        if self._last_closing is not None:
            self.on_round(wait, now - self._last_closing)
        self._last_closing = now
        self.closed_rounds += 1
        if not self._marks or now - self._marks[-1][0] >= _RATE_INTERVAL:
            self._marks.append((now, self.closed_rounds))
        epoch_ends = self.rounds_per_epoch > 0 and (round_number + 1) % self.rounds_per_epoch == 0
        if epoch_ends or now - span.started >= _SPAN_SECONDS:
            self._record_span(now)

    def _epoch(self, rounds: int) -> float:
        """Return a number of rounds in epochs; 0 before the first join, which tells how long an epoch is."""
        return rounds / self.rounds_per_epoch if self.rounds_per_epoch else 0.0

    def _closed_without_targets(self, round_number: int, contributions: int, why: str) -> None:
        if self._last_without_targets != round_number - 1:
            message = f"round {round_number} closed with {contributions} contributions, {why}: no targets"
            self.record_event("below quorum", message=message)
        self._last_without_targets = round_number
        self.rounds_without_targets += 1

    def measure_agreement(
        self, round_number: int, students: tuple[str, ...], logits: torch.Tensor, labels: torch.Tensor
    ) -> None:
        """Measure on a round's logits [K, B, C] how good the ensemble is and how far the students agree.

        Call it before :meth:`record_round`, so that a span's record covers its own last round.
        """
        self._agreement.measure(round_number, students, logits, labels, self.rounds_per_epoch)

    def flush(self) -> None:
        """Record the closed rounds, and the numbers of rejected calls, that are not recorded yet."""
        for (what, student), others in self._suppressed.items():
            self.record_event(what, student, f"{others} more")
        self._suppressed.clear()
        self._record_span(self._clock())

    def rounds_per_second(self) -> float:
        """Return the rate of closed rounds over the last seconds."""
        if not self._marks:
            return 0.0
        since, count = self._marks[0]
        return (self.closed_rounds - count) / max(self._clock() - since, _RATE_INTERVAL)

    def snapshot(
        self,
        presence: Mapping[str, Presence],
        frontier: int,
        waiting: Waiting | None,
    ) -> pb.Run:
        """Return the run's state as a message.

        Args:
            presence: of each student and teacher, by name.
            frontier: the first round that is not closed.
            waiting: the students that the open round waits for, if any.
        """
        run = pb.Run(
            name=self.name,
            method=self.method,
            frontier=self._frontier(frontier),
            total_rounds=self.total_rounds,
            students=self.students.values(),
            waiting_for=waiting.students if waiting is not None else (),
            waiting_seconds=waiting.seconds if waiting is not None else 0.0,
            rounds_per_second=self.rounds_per_second(),
            ensemble_accuracy=self._agreement.ensemble_accuracy,
            disagreements=[
                pb.Disagreement(first=first, second=second, ratio=ratio)
                for (first, second), ratio in self._agreement.disagreement.items()
            ],
            events=[
                pb.Event(unix_seconds=event.time, kind=event.what, student=event.student, message=event.message)
                for event in self._events
            ],
            complete=all(state is Presence.FINISHED for state in presence.values()),
            uptime_seconds=self._clock() - self._started,
        )
        for status in run.students:
            status.state = _STATES[presence[status.name]]
        return run

    def _frontier(self, exchanged: int) -> int:
        """Return the run's frontier, which never exceeds the run's rounds.

        Where nothing is exchanged it is the round of the slowest student.
        """
        if not self.exchanges:
            return min(status.round for status in self.students.values())
        return min(exchanged, self.total_rounds) if self.total_rounds else exchanged

    def _record_span(self, now: float) -> None:
        span, self._span = self._span, None
        if span is not None:
            agreement = self._agreement
            self._record(span.record(self._wall(), now, agreement.ensemble_accuracy, agreement.disagreement))


def _ignore(wait: float, seconds: float) -> None:
    """Do nothing: the default of `on_round`."""
