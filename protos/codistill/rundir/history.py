"""The history of one run, from the records in its folder: typed series, each measurement once.

A student that resumes from a checkpoint repeats steps. A server that lost its last journalled rounds closes them again. So
``metrics.jsonl`` may hold several lines for one measurement or round; the last one counts. :func:`collect` is pure;
:func:`read` reads a folder; :class:`codistill.rundir.follower.Follower` reads one while the run goes on.
"""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from codistill.config import experiment as experiments
from codistill.config.experiment import Experiment
from codistill.rundir import records, spans
from codistill.rundir.info import RunInfo
from codistill.rundir.layout import RunLayout
from codistill.rundir.records import Happened, Joined, Measured, Paced, ParticipantWait, Record, RoundsClosed
from codistill.rundir.series import Series, better

__all__ = ["RESTARTED", "Collector", "History", "ParticipantHistory", "collect", "read"]

RESTARTED = "restarted"
"""The event of a process that ended and was started again."""

_UNMERGED = 50  # of the newest spans: a server that lost its last rounds closes them again


@dataclass(frozen=True)
class ParticipantHistory:
    """The series of one participant, each in the order of its steps."""

    name: str
    model: str
    parameters: int | None
    """Trainable parameters; None if it never joined."""
    device: str
    """As reported when it last joined; empty if it never joined."""
    train: tuple[Measured, ...]
    test: tuple[Measured, ...]
    pace: tuple[Paced, ...]
    final: Measured | None
    """The test measurement of the last epoch, not of the best; None if training did not get there."""
    best: Measured | None = None
    """The test measurement with the highest accuracy, the first of several."""
    train_count: int = 0
    """The number of training measurements, including those that a bounded history does not keep."""
    test_count: int = 0
    """The same for the test measurements."""
    restarts: int = 0
    """How often its worker was started again."""
    joins: int = 0
    """How often it joined: once, and again after each restart, resumption or broken connection."""
    missed_rounds: int = 0
    """How many rounds closed without it."""
    teacher: bool = False
    """Whether it is a teacher, not a student."""

    @property
    def step_seconds(self) -> float | None:
        """The median of the reported step times, waiting included; None where none was reported."""
        return _median(pace.step_seconds for pace in self.pace if pace.step_seconds > 0)

    @property
    def wait_seconds(self) -> float | None:
        """The median of the reported waits for targets; None where no step was reported."""
        return _median(pace.wait_seconds for pace in self.pace if pace.step_seconds > 0)


@dataclass(frozen=True)
class History:
    """The history of one run."""

    experiment: Experiment
    info: RunInfo
    participants: tuple[ParticipantHistory, ...]
    """The students in the experiment's order, then the teachers."""
    rounds: tuple[RoundsClosed, ...]
    """Spans of closed rounds that do not overlap, in order."""
    events: tuple[Happened, ...]
    """In order of time."""
    total_rounds: int | None
    """The rounds of the whole run, 0 where nothing is exchanged; None if nobody joined."""
    total_steps: int | None
    """The steps of each student; None if nobody joined."""
    started: float | None = None
    """The time of the first record, in seconds since 1970-01-01 UTC; None if there is none."""
    ended: float | None = None
    """The time of the last record."""
    waits: Mapping[str, ParticipantWait] = field(default_factory=dict[str, ParticipantWait])
    """How long each participant was waited for, over all rounds."""
    server_restarts: int = 0
    """How often the server was started again."""

    @property
    def students(self) -> tuple[ParticipantHistory, ...]:
        """The participants without the teachers."""
        return tuple(participant for participant in self.participants if not participant.teacher)

    @property
    def complete(self) -> bool:
        """Whether every student was tested after the last epoch."""
        return all(student.final is not None for student in self.students)

    @property
    def closed_rounds(self) -> int:
        """The number of closed rounds with a record."""
        return sum(map(spans.length, self.rounds))

    @property
    def rounds_without_targets(self) -> int:
        """How many rounds closed below the quorum, without targets."""
        return sum(span.without_targets for span in self.rounds)

    @property
    def seconds(self) -> float | None:
        """The time from the first record to the last, interruptions included."""
        return None if self.started is None or self.ended is None else self.ended - self.started

    @property
    def ensemble_accuracy(self) -> float | None:
        """The share of an epoch's training samples that the mean of the students' probabilities classifies correctly.

        It is that of the last epoch with records; None without records.
        """
        known = (span.ensemble_accuracy for span in reversed(self.rounds) if span.ensemble_accuracy is not None)
        return next(known, None)

    def epoch(self, steps: int) -> float | None:
        """Return a number of steps in epochs; None if nobody joined."""
        return steps * self.experiment.training.epochs / self.total_steps if self.total_steps else None


def collect(
    experiment: Experiment, metrics: Iterable[Record], events: Iterable[Record] = (), info: RunInfo | None = None
) -> History:
    """Return the history of a run from its records.

    Args:
        experiment: the run's; its participants come first, in its order, with or without records.
        metrics: the records of ``metrics.jsonl``, in the file's order.
        events: the records of ``events.jsonl`` and ``supervisor.jsonl``, each in the file's order.
        info: the content of ``run.json``.
    """
    collector = Collector(experiment)
    for record in (*metrics, *events):
        collector.add(record)
    return collector.history(info or RunInfo())


def read(folder: Path) -> History:
    """Return the history of a run from its folder.

    Raises:
        ExperimentError: ``experiment.yaml`` is missing or cannot be used.
        ValueError: a line of the records, or ``run.json``, is not of its form.
    """
    layout = RunLayout(folder)
    return collect(
        experiments.load(layout.experiment_file),
        records.read(layout.metrics_file),
        (*records.read(layout.events_file), *records.read(layout.supervisor_file)),
        RunInfo.read(layout.info_file),
    )


class Collector:
    """Sorts records into series as they come.

    Args:
        experiment: the run's.
        limit: the most measurements of a series, spans of rounds, and events; None keeps all.
    """

    def __init__(self, experiment: Experiment, limit: int | None = None) -> None:
        self._experiment = experiment
        self._limit = limit
        self._joined: dict[str, Joined] = {}
        self._measured: dict[tuple[str, str], Series[Measured]] = {}
        self._paced: dict[str, Series[Paced]] = {}
        self._spans: list[RoundsClosed] = []
        self._happened: deque[Happened] = deque(maxlen=limit)
        self._restarts: Counter[str] = Counter()
        self._joins: Counter[str] = Counter()
        self._names = dict.fromkeys(experiment.participants)
        self._started: float | None = None
        self._ended: float | None = None

    def add(self, record: Record) -> None:
        """Add one record."""
        self._started = record.time if self._started is None else min(self._started, record.time)
        self._ended = record.time if self._ended is None else max(self._ended, record.time)
        match record:
            case Joined():
                self._joined[record.participant] = record
                self._joins[record.participant] += 1
                self._names.setdefault(record.participant)
            case Measured():
                self._series(record.participant, record.split).add(record)
                self._names.setdefault(record.participant)
            case Paced():
                self._paces(record.participant).add(record)
                self._names.setdefault(record.participant)
            case RoundsClosed():
                spans.add(self._spans, record)
                if self._limit is not None and len(self._spans) > self._limit:
                    self._spans[:-_UNMERGED] = spans.merged_by_two(self._spans[:-_UNMERGED])
            case Happened():
                self._happened.append(record)
                self._restarts[record.participant] += record.what == RESTARTED

    def history(self, info: RunInfo) -> History:
        """Return the history of the records added so far."""
        return History(
            experiment=self._experiment,
            info=info,
            participants=tuple(self._participant(name) for name in self._names),
            rounds=tuple(self._spans),
            events=tuple(sorted(self._happened, key=lambda event: event.time)),
            total_rounds=max((join.total_rounds for join in self._joined.values()), default=None),
            total_steps=max((join.total_steps for join in self._joined.values()), default=None),
            started=self._started,
            ended=self._ended,
            waits=spans.waited_for(self._spans),
            server_restarts=self._restarts[""],
        )

    def _participant(self, name: str) -> ParticipantHistory:
        experiment = self._experiment
        models = {spec.name: spec.model for spec in (*experiment.students, *experiment.teachers)}
        join = self._joined.get(name)
        train, test = self._series(name, "train"), self._series(name, "test")
        tested = test.records
        teacher = name in experiment.teacher_names  # evaluated once: its weights do not change
        done = bool(tested) and (teacher or tested[-1].epochs_trained >= experiment.training.epochs - 1e-6)
        best = test.best
        for measured in tested:
            best = better(best, measured)
        return ParticipantHistory(
            name=name,
            model=models.get(name, join.model if join else ""),
            parameters=join.parameters if join else None,
            device=join.device if join else "",
            train=train.records,
            test=tested,
            pace=self._paces(name).records,
            final=tested[-1] if done else None,
            best=best,
            train_count=train.count,
            test_count=test.count,
            restarts=self._restarts[name],
            joins=self._joins[name],
            teacher=teacher,
            missed_rounds=sum(span.missed.get(name, 0) for span in self._spans),
        )

    def _series(self, participant: str, split: str) -> Series[Measured]:
        return self._measured.setdefault((participant, split), Series[Measured](self._limit))

    def _paces(self, participant: str) -> Series[Paced]:
        return self._paced.setdefault(participant, Series[Paced](self._limit))


def _median(values: Iterable[float]) -> float | None:
    known = list(values)
    return statistics.median(known) if known else None
