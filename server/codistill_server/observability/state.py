"""The state of a run, as status, metrics, reports and the live table show it.

The coordinator keeps :class:`RunState` up to date. Nothing in here has any effect on training.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, cast

import torch
from google.protobuf.timestamp_pb2 import Timestamp

from codistill.config.experiment import Experiment
from codistill.config.fingerprint import identity_sha256
from codistill.config.schedule import EVERY_STEP, ExchangeSchedule
from codistill.rundir.records import Happened, Joined, Measured, Paced, Record
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.times import duration, seconds
from codistill.wire.words import word
from codistill_server.observability.agreement import Agreement
from codistill_server.observability.span import Span
from codistill_server.ratelimit import Rate, TokenBuckets
from codistill_server.rounds.actions import Status, Waiting
from codistill_server.rounds.machine import ParticipantState

__all__ = ["RunState"]

_EVENTS = 200
_RATE_MARKS = 20
_RATE_INTERVAL = 0.5
_SPAN_SECONDS = 30.0
_REJECTIONS = Rate(20, 1 / 60)  # events of a kind and a participant: a stranger's calls must not fill the disk
_NANOSECONDS = 1_000_000_000

# What a report and a status both have by one name is shown as last reported.
_REPORTED = tuple(
    field
    for field in pb.ReportRequest.DESCRIPTOR.fields
    if field.name in pb.ParticipantStatus.DESCRIPTOR.fields_by_name and field.name != "measurements"
)


class RunState:
    """The state of one run.

    Args:
        experiment: the run's.
        record: called with each record to be written.
        clock: monotonic time in seconds.
        wall: seconds since 1970, for records.

    Attributes:
        participants: the status of each participant, by name; :meth:`snapshot` sets `state` and `awaited`.
        total_rounds: the number of rounds of the run; 0 until known, and where nothing is exchanged.
        total_steps: the number of steps of each student; 0 until known.
        schedule: the steps that exchange.
        steps_per_epoch: the number of steps in an epoch; 0 until known.
        closed_rounds: the number of rounds that this server closed.
        rounds_without_targets: how many of them closed without targets.
        rejected: the number of rejected contributions, by reason.
        bytes_in: the size of all contributions received.
        bytes_out: the size of all replies sent.
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
        self.participants = {
            spec.name: pb.ParticipantStatus(name=spec.name, role=role, model=spec.model)
            for role, specs in ((pb.ROLE_STUDENT, experiment.students), (pb.ROLE_TEACHER, experiment.teachers))
            for spec in specs
        }
        self.total_rounds = 0
        self.total_steps = 0
        self.schedule: ExchangeSchedule = EVERY_STEP
        self.steps_per_epoch = 0
        self.closed_rounds = 0
        self.rounds_without_targets = 0
        # From 0 on, so that the first of a kind shows as a rise.
        self.rejected: dict[Status, int] = {status: 0 for status in Status if status is not Status.SUPERSEDED}
        self.bytes_in = 0
        self.bytes_out = 0
        self.on_round: Callable[[float, float], None] = _ignore
        self._experiment_sha256 = identity_sha256(experiment)
        self._record = record
        self._clock = clock
        self._wall = wall
        self._started = clock()
        self._events: deque[pb.Event] = deque(maxlen=_EVENTS)
        self._rejections = TokenBuckets(_REJECTIONS)
        self._suppressed: Counter[tuple[pb.EventKind.ValueType, str]] = Counter()
        self._marks: deque[tuple[float, int]] = deque(maxlen=_RATE_MARKS)
        self._last_closing: float | None = None
        self._last_without_targets = -2
        self._skipped_since: dict[str, int] = {}
        self._span: Span | None = None
        self._agreement = Agreement()

    def record_event(self, kind: pb.EventKind.ValueType, participant: str = "", message: str = "") -> None:
        """Record an event."""
        now = self._wall()
        self._events.append(pb.Event(time=_timestamp(now), kind=kind, participant=participant, message=message))
        self._record(Happened(time=now, what=word(pb.EventKind, kind), participant=participant, message=message))

    def record_rejection(self, kind: pb.EventKind.ValueType, participant: str, message: str) -> str | None:
        """Record a rejected call as an event; of many, record one a minute that counts the others.

        Returns:
            The event's message; None where none was recorded.
        """
        if self._rejections.take(f"{kind} {participant}", self._clock()):
            self._suppressed[kind, participant] += 1
            return None
        others = self._suppressed.pop((kind, participant), 0)
        recorded = f"{message} (and {others} more before it)" if others else message
        self.record_event(kind, participant, recorded)
        return recorded

    def record_join(self, request: pb.JoinRequest) -> None:
        """Record that a participant joined."""
        status = self.participants[request.participant]
        status.parameters, status.device = request.parameters, request.device
        status.round, status.steps_trained = request.first_round, request.steps_trained
        status.epochs_trained = self._epochs(request.steps_trained)
        status.joins += 1
        self._record(
            Joined(
                time=self._wall(),
                participant=status.name,
                model=status.model,
                parameters=status.parameters,
                device=status.device,
                total_rounds=request.total_rounds,
                total_steps=request.total_steps,
            )
        )

    def record_report(self, participant: str, request: pb.ReportRequest) -> None:
        """Record the progress that a participant reports. What the report leaves unset stays as it was."""
        status = self.participants[participant]
        given = {field.name for field, _ in request.ListFields()}
        for field in _REPORTED:
            value = getattr(request, field.name)
            if field.has_presence and field.name not in given:
                continue
            if field.message_type is None:
                setattr(status, field.name, value)
            else:
                getattr(status, field.name).CopyFrom(value)
        if request.HasField("step_time"):
            self._record(
                Paced(
                    time=self._wall(),
                    participant=participant,
                    steps_trained=request.steps_trained,
                    step_seconds=seconds(request.step_time),
                    wait_seconds=seconds(request.wait_time),
                )
            )
        latest = {measurement.split: measurement for measurement in (*status.measurements, *request.measurements)}
        status.ClearField("measurements")
        status.measurements.extend(latest[split] for split in sorted(latest))
        for measurement in request.measurements:
            self._record(
                Measured(
                    time=self._wall(),
                    participant=participant,
                    split=cast("Literal['train', 'test']", word(pb.Split, measurement.split)),
                    steps_trained=measurement.steps_trained,
                    epochs_trained=self._epochs(measurement.steps_trained),
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

    def record_skipped(self, participant: str, round_number: int, reason: str) -> None:
        """Record that the frontier no longer waits for a participant."""
        self._skipped_since[participant] = round_number
        self.record_event(pb.EVENT_KIND_SKIPPED, participant, f"skipped from round {round_number} on: {reason}")

    def record_awaited(self, participant: str, round_number: int) -> None:
        """Record that the frontier waits for a participant again."""
        since = self._skipped_since.pop(participant, round_number)
        missed = f"; it missed rounds from {since} on" if since < round_number else ""
        in_all = self.participants[participant].missed_rounds
        message = f"awaited from round {round_number} on{missed}, {in_all} rounds missed in all"
        self.record_event(pb.EVENT_KIND_AWAITED, participant, message)

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
            arrived: when each contribution arrived, by participant.
            missing: the participants without a contribution.
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
            self.participants[name].missed_rounds += 1
        if not targets:
            self._closed_without_targets(round_number, len(arrived), why)
        if self._last_closing is not None:
            self.on_round(wait, now - self._last_closing)
        self._last_closing = now
        self.closed_rounds += 1
        if not self._marks or now - self._marks[-1][0] >= _RATE_INTERVAL:
            self._marks.append((now, self.closed_rounds))
        if self._ends_epoch(round_number) or now - span.started >= _SPAN_SECONDS:
            self._record_span(now)

    def _epochs(self, steps: int) -> float:
        """Return a number of steps in epochs; 0 before the first join, which tells how long an epoch is."""
        return steps / self.steps_per_epoch if self.steps_per_epoch else 0.0

    def _ends_epoch(self, round_number: int) -> bool:
        """Return whether the next round belongs to a later epoch."""
        if not self.steps_per_epoch:
            return False
        epoch, following = (
            self.schedule.step_of(number) // self.steps_per_epoch for number in (round_number, round_number + 1)
        )
        return epoch != following

    def _closed_without_targets(self, round_number: int, contributions: int, why: str) -> None:
        if self._last_without_targets != round_number - 1:
            message = f"round {round_number} closed with {contributions} contributions, {why}: no targets"
            self.record_event(pb.EVENT_KIND_BELOW_QUORUM, message=message)
        self._last_without_targets = round_number
        self.rounds_without_targets += 1

    def measure_agreement(
        self, round_number: int, students: tuple[str, ...], logits: torch.Tensor, labels: torch.Tensor
    ) -> None:
        """Measure on a round's logits [K, B, C] how good the ensemble is and how far the students agree.

        Call it before :meth:`record_round`, so that a span's record covers its own last round.
        """
        rounds_per_epoch = math.ceil(self.steps_per_epoch / self.schedule.every)
        self._agreement.measure(round_number, students, logits, labels, rounds_per_epoch)

    def flush(self) -> None:
        """Record the closed rounds, and the numbers of rejected calls, that are not recorded yet."""
        for (kind, participant), others in self._suppressed.items():
            self.record_event(kind, participant, f"{others} more")
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
        states: Mapping[str, ParticipantState],
        awaited: Collection[str],
        frontier: int,
        waiting: Waiting | None,
    ) -> pb.Run:
        """Return the run's state as a message.

        Args:
            states: the state of each participant, by name.
            awaited: the participants that the frontier waits for.
            frontier: the first round that is not closed.
            waiting: the participants that the open round waits for, if any.
        """
        run = pb.Run(
            name=self.name,
            method=self.method,
            experiment_sha256=self._experiment_sha256,
            frontier=frontier,
            total_rounds=self.total_rounds,
            steps_trained=self._steps_trained(frontier),
            total_steps=self.total_steps,
            participants=self.participants.values(),
            waiting_for=waiting.participants if waiting is not None else (),
            waiting_time=duration(waiting.seconds if waiting is not None else 0.0),
            rounds_per_second=self.rounds_per_second(),
            ensemble_accuracy=self._agreement.ensemble_accuracy,
            disagreements=[
                pb.Disagreement(first=first, second=second, ratio=ratio)
                for (first, second), ratio in self._agreement.disagreement.items()
            ],
            events=self._events,
            complete=all(state is ParticipantState.FINISHED for state in states.values()),
            uptime=duration(self._clock() - self._started),
        )
        for status in run.participants:
            status.state = pb.ParticipantState.Value(f"PARTICIPANT_STATE_{states[status.name].name}")
            status.awaited = status.name in awaited
        return run

    def _steps_trained(self, frontier: int) -> int:
        """Return the number of steps before the frontier; before the first round, that of the slowest student."""
        if not (self.exchanges and frontier):
            students = (status for status in self.participants.values() if status.role == pb.ROLE_STUDENT)
            return min(status.steps_trained for status in students)
        steps = self.schedule.step_of(frontier)
        return min(steps, self.total_steps) if self.total_steps else steps

    def _record_span(self, now: float) -> None:
        span, self._span = self._span, None
        if span is not None:
            agreement = self._agreement
            steps = self.schedule.step_of(span.last) + 1
            self._record(span.record(self._wall(), now, steps, agreement.ensemble_accuracy, agreement.disagreement))


def _ignore(wait: float, seconds: float) -> None:
    """Do nothing: the default of `on_round`."""


def _timestamp(unix_seconds: float) -> Timestamp:
    whole, nanos = divmod(round(unix_seconds * _NANOSECONDS), _NANOSECONDS)
    return Timestamp(seconds=whole, nanos=nanos)
