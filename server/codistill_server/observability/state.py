"""Where a run stands: everything that status, metrics, reports and the live table show.

The coordinator feeds :class:`RunState`; nothing in here has any effect on training.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from codistill.config.experiment import Experiment
from codistill.rundir.records import Happened, Joined, Measured, Paced, Record, RoundsClosed, StudentWait
from codistill.v1 import distillation_pb2 as pb
from codistill_server.ratelimit import Rate, TokenBuckets
from codistill_server.rounds.actions import Status, Waiting
from codistill_server.rounds.machine import Presence

__all__ = ["ParticipantState", "RunState"]

_EVENTS = 200
_RATE_MARKS = 20
_RATE_INTERVAL = 0.5
_AGREEMENT_ROUNDS = 64  # of an epoch, evenly spaced: enough for half a point, and next to nothing of a round's time
_SPAN_SECONDS = 30.0
_REFUSALS = Rate(20, 1 / 60)  # of a kind and a student: what people read; whoever knocks must not fill the disk

_STATES: Mapping[Presence, pb.StudentState.ValueType] = {
    Presence.EXPECTED: pb.STUDENT_STATE_EXPECTED,
    Presence.PRESENT: pb.STUDENT_STATE_PRESENT,
    Presence.ABSENT: pb.STUDENT_STATE_ABSENT,
    Presence.FINISHED: pb.STUDENT_STATE_FINISHED,
    Presence.FAILED: pb.STUDENT_STATE_FAILED,
}


@dataclass
class ParticipantState:
    """What is known of one student."""

    name: str
    model: str
    parameters: int = 0
    device: str = ""
    round: int = 0
    epoch: float = 0.0
    durable_round: int = 0
    step_seconds: float = 0.0
    wait_seconds: float = 0.0
    measured: dict[str, pb.Measurement] = field(default_factory=dict[str, pb.Measurement])
    missed_rounds: int = 0
    joins: int = 0
    absent_since: int | None = None
    teacher: bool = False


@dataclass
class _Span:
    """What is gathered of a span of rounds until it is written down."""

    started: float
    first: int
    last: int
    waits: list[float] = field(default_factory=list[float])
    last_rounds: dict[str, int] = field(default_factory=dict[str, int])
    last_seconds: dict[str, float] = field(default_factory=dict[str, float])
    missed: Counter[str] = field(default_factory=Counter[str])
    without_targets: int = 0


@dataclass(frozen=True)
class _Agreement:
    """What one round's logits say of the students together."""

    round: int
    students: tuple[str, ...]
    samples: int
    right: int
    """Samples that the mean of the students' probabilities classifies correctly."""
    differ: torch.Tensor
    """Samples on which two students differ, [K, K]."""


class RunState:
    """The run's state as seen from outside.

    Args:
        experiment: the run's experiment.
        record: where records go.
        clock: seconds that never go back.
        wall: seconds since 1970, for records.
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
        taking_part = (*experiment.students, *experiment.teachers)
        self.students = {each.name: ParticipantState(each.name, each.model) for each in taking_part}
        for name in experiment.teacher_names:
            self.students[name].teacher = True
        self.total_rounds = 0
        self.rounds_per_epoch = 0
        self.closed_rounds = 0
        self.rounds_without_targets = 0
        # From 0 on, so that the first of a kind shows as a rise.
        self.rejected: dict[Status, int] = {each: 0 for each in Status if each is not Status.SUPERSEDED}
        self.bytes_in = 0
        self.bytes_out = 0
        self.on_round: Callable[[float, float], None] = _nothing
        self._record = record
        self._clock = clock
        self._wall = wall
        self._started = clock()
        self._events: deque[Happened] = deque(maxlen=_EVENTS)
        self._refusals = TokenBuckets(_REFUSALS)
        self._untold: Counter[tuple[str, str]] = Counter()
        self._marks: deque[tuple[float, int]] = deque(maxlen=_RATE_MARKS)
        self._last_closing: float | None = None
        self._last_without_targets = -2
        self._span: _Span | None = None
        self._agreement: deque[_Agreement] = deque(maxlen=_AGREEMENT_ROUNDS)

    def event(self, what: str, student: str = "", message: str = "") -> None:
        """Takes in something that happened."""
        happened = Happened(time=self._wall(), what=what, student=student, message=message)
        self._events.append(happened)
        self._record(happened)

    def refusal(self, what: str, student: str, message: str) -> None:
        """Takes in that somebody was turned away: an event, or where there are many, one a minute that counts the others."""
        if self._refusals.take(f"{what} {student}", self._clock()):
            self._untold[what, student] += 1
            return
        others = self._untold.pop((what, student), 0)
        self.event(what, student, f"{message} (and {others} more before it)" if others else message)

    def joined(self, request: pb.JoinRequest) -> None:
        """Takes in that a student joined."""
        view = self.students[request.student]
        view.parameters, view.device = request.parameters, request.device
        view.round = request.first_round
        view.epoch = self._epoch(view.round)
        view.joins += 1
        self._record(
            Joined(
                time=self._wall(),
                student=view.name,
                model=view.model,
                parameters=view.parameters,
                device=view.device,
                total_rounds=request.total_rounds,
            )
        )

    def reported(self, student: str, report: pb.ReportRequest) -> None:
        """Takes in what a student reports of itself."""
        view = self.students[student]
        view.round, view.epoch, view.durable_round = report.round, report.epoch, report.durable_round
        if report.step_seconds > 0:
            view.step_seconds, view.wait_seconds = report.step_seconds, report.wait_seconds
            self._record(
                Paced(
                    time=self._wall(),
                    student=student,
                    round=report.round,
                    step_seconds=report.step_seconds,
                    wait_seconds=report.wait_seconds,
                )
            )
        for measurement in report.measurements:
            split = "test" if measurement.split == pb.SPLIT_TEST else "train"
            view.measured[split] = measurement
            self._record(
                Measured(
                    time=self._wall(),
                    student=student,
                    split=split,
                    round=measurement.round,
                    epoch=self._epoch(measurement.round),
                    accuracy=measurement.accuracy,
                    loss=measurement.loss,
                    distillation_loss=measurement.distillation_loss
                    if measurement.HasField("distillation_loss")
                    else None,
                )
            )

    def reject(self, status: Status) -> None:
        """Counts a contribution that was turned away."""
        self.rejected[status] = self.rejected.get(status, 0) + 1

    def absent(self, student: str, number: int, reason: str) -> None:
        """Takes in that the frontier no longer waits for a student."""
        self.students[student].absent_since = number
        self.event("absent", student, f"absent from round {number} on: {reason}")

    def returned(self, student: str, number: int) -> None:
        """Takes in that the frontier waits for a student again."""
        view = self.students[student]
        since, view.absent_since = view.absent_since, None
        missed = f"; it missed rounds from {since} on" if since is not None and since < number else ""
        self.event("returned", student, f"back at round {number}{missed}, {view.missed_rounds} rounds missed in all")

    def round_closed(
        self,
        number: int,
        arrived: Mapping[str, float],
        missing: Sequence[str] = (),
        *,
        targets: bool = True,
        why: str = "below the quorum",
    ) -> None:
        """Takes in that a round closed, when each contribution to it came in, who missed it, and why without targets."""
        now = self._clock()
        order = sorted(arrived, key=lambda name: arrived[name])
        wait = arrived[order[-1]] - arrived[order[0]]
        if self._span is None:
            started = self._last_closing if self._last_closing is not None else arrived[order[0]]
            self._span = _Span(started, number, number)
        span = self._span
        span.last = number
        span.waits.append(wait)
        if len(order) > 1:
            last = order[-1]
            span.last_rounds[last] = span.last_rounds.get(last, 0) + 1
            alone = arrived[last] - arrived[order[-2]]
            span.last_seconds[last] = span.last_seconds.get(last, 0.0) + alone
        for name in missing:
            self.students[name].missed_rounds += 1
            span.missed[name] += 1
        if not targets:
            self._closed_without_targets(number, len(arrived), why)
            span.without_targets += 1
        if self._last_closing is not None:
            self.on_round(wait, now - self._last_closing)
        self._last_closing = now
        self.closed_rounds += 1
        if not self._marks or now - self._marks[-1][0] >= _RATE_INTERVAL:
            self._marks.append((now, self.closed_rounds))
        epoch_ends = self.rounds_per_epoch > 0 and (number + 1) % self.rounds_per_epoch == 0
        if epoch_ends or now - span.started >= _SPAN_SECONDS:
            self._write_span(number, now)

    def _epoch(self, number: int) -> float:
        """Returns how many epochs so many rounds are; 0 while nobody has joined, from whom it is known."""
        return number / self.rounds_per_epoch if self.rounds_per_epoch else 0.0

    def _closed_without_targets(self, number: int, contributions: int, why: str) -> None:
        if self._last_without_targets != number - 1:
            message = f"round {number} closed with {contributions} contributions, {why}: no targets"
            self.event("below quorum", message=message)
        self._last_without_targets = number
        self.rounds_without_targets += 1

    def agreement(self, number: int, students: tuple[str, ...], logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Measures on a round's logits [K, B, C] how good the ensemble is and how far the students agree.

        Of a long epoch it takes a share of the rounds, chosen by their numbers: what is measured is the same on every
        machine. Whoever wants a span to tell of its own last round calls this before :meth:`round_closed`.
        """
        if number % math.ceil(max(self.rounds_per_epoch, 1) / _AGREEMENT_ROUNDS):
            return
        votes = logits.argmax(-1)
        ensemble = logits.softmax(-1).sum(0).argmax(-1)
        differ = (votes[:, None] != votes[None]).sum(-1)
        self._agreement.append(_Agreement(number, students, len(labels), int((ensemble == labels).sum()), differ))
        while self.rounds_per_epoch and self._agreement[0].round <= number - self.rounds_per_epoch:
            self._agreement.popleft()

    @property
    def ensemble_accuracy(self) -> float | None:
        """The share of an epoch's samples, up to the last round, that the students' mean probability classifies correctly.

        None until it is known.
        """
        samples = sum(each.samples for each in self._agreement)
        return sum(each.right for each in self._agreement) / samples if samples else None

    @property
    def disagreement(self) -> dict[tuple[str, str], float]:
        """The share of the same samples on which two students differ, for each pair that was measured together."""
        differ: Counter[tuple[str, str]] = Counter()
        samples: Counter[tuple[str, str]] = Counter()
        for students, rounds in self._agreement_by_students().items():
            total = sum(each.samples for each in rounds)
            counts = torch.stack([each.differ for each in rounds]).sum(0).tolist()
            for (one, first), (other, second) in itertools.combinations(enumerate(students), 2):
                differ[first, second] += counts[one][other]
                samples[first, second] += total
        return {pair: differ[pair] / samples[pair] for pair in samples}

    def _agreement_by_students(self) -> dict[tuple[str, ...], list[_Agreement]]:
        found: dict[tuple[str, ...], list[_Agreement]] = {}
        for each in self._agreement:
            found.setdefault(each.students, []).append(each)
        return found

    def flush(self) -> None:
        """Writes down the rounds and the number of refusals that are not written yet."""
        for (what, student), others in self._untold.items():
            self.event(what, student, f"{others} more")
        self._untold.clear()
        if self._span is not None:
            self._write_span(self._span.last, self._clock())

    def rounds_per_second(self) -> float:
        """Returns the rate of closed rounds over the last seconds."""
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
        """Returns where the run stands, as a message."""
        views = self.students.values()
        return pb.Run(
            name=self.name,
            method=self.method,
            frontier=self._frontier(frontier),
            total_rounds=self.total_rounds,
            students=[
                pb.StudentStatus(
                    name=view.name,
                    model=view.model,
                    state=_STATES[presence[view.name]],
                    round=view.round,
                    epoch=view.epoch,
                    durable_round=view.durable_round,
                    parameters=view.parameters,
                    measurements=[view.measured[split] for split in ("train", "test") if split in view.measured],
                    device=view.device,
                    step_seconds=view.step_seconds,
                    wait_seconds=view.wait_seconds,
                    missed_rounds=view.missed_rounds,
                    joins=view.joins,
                    teacher=view.teacher,
                )
                for view in views
            ],
            waiting_for=waiting.students if waiting is not None else (),
            waiting_seconds=waiting.seconds if waiting is not None else 0.0,
            rounds_per_second=self.rounds_per_second(),
            ensemble_accuracy=self.ensemble_accuracy,
            disagreements=[
                pb.Disagreement(first=first, second=second, ratio=ratio)
                for (first, second), ratio in self.disagreement.items()
            ],
            events=[
                pb.Event(unix_seconds=each.time, kind=each.what, student=each.student, message=each.message)
                for each in self._events
            ],
            complete=all(each is Presence.FINISHED for each in presence.values()),
            uptime_seconds=self._clock() - self._started,
        )

    def _frontier(self, exchanged: int) -> int:
        """Returns the run's frontier; where the last rounds exchange nothing, it does not go beyond the run."""
        if not self.exchanges:
            return min(view.round for view in self.students.values())
        return min(exchanged, self.total_rounds) if self.total_rounds else exchanged

    def _write_span(self, last: int, now: float) -> None:
        span = self._span
        if span is None:
            return
        self._span = None
        waits = sorted(span.waits)
        self._record(
            RoundsClosed(
                time=self._wall(),
                first=span.first,
                last=last,
                seconds=now - span.started,
                wait_p50=waits[len(waits) // 2],
                wait_max=waits[-1],
                waits={
                    name: StudentWait(rounds=count, seconds=span.last_seconds[name])
                    for name, count in span.last_rounds.items()
                },
                ensemble_accuracy=self.ensemble_accuracy,
                disagreement={f"{first}|{second}": ratio for (first, second), ratio in self.disagreement.items()},
                missed=dict(span.missed),
                without_targets=span.without_targets,
            )
        )


def _nothing(wait: float, seconds: float) -> None:
    """Stands in until somebody wants to hear of closed rounds."""
