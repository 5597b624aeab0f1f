"""What one run folder says happened: typed series, each measurement once.

A student that resumes from a checkpoint repeats rounds, and a server that lost its last journalled rounds closes them
again, so ``metrics.jsonl`` may speak of the same thing twice. The later line stands. :func:`collect` is pure;
:func:`read` is the same from a folder.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from codistill import experiment as experiments
from codistill import records
from codistill.experiment import Experiment
from codistill.records import Happened, Joined, Measured, Paced, Record, RoundsClosed, StudentWait

__all__ = [
    "RESTARTED",
    "SUPERVISOR_FILE",
    "History",
    "RunInfo",
    "StudentHistory",
    "collect",
    "longest_wait",
    "median_wait",
    "read",
    "waited_for",
]

_T = TypeVar("_T")

SUPERVISOR_FILE = "supervisor.jsonl"
"""Where `codistill run` writes what became of the processes that it started."""
RESTARTED = "restarted"
"""The event of a process that ended and is started again."""


class RunInfo(BaseModel):
    """``run.json``: what of a run is not in its experiment. Every field may be missing."""

    model_config = ConfigDict(frozen=True)

    created: datetime | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    command: tuple[str, ...] = ()
    mode: Literal["grpc", "in-process"] | None = None
    machine: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> RunInfo:
        """Reads a run folder's ``run.json``; all fields are missing where there is no such file.

        Raises:
            ValueError: the file is not of this form.
        """
        path = folder / "run.json"
        if not path.exists():
            return cls()
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{path}: {where + ': ' if where else ''}{first['msg']}") from error


@dataclass(frozen=True)
class StudentHistory:
    """One student's series, each in the order of its rounds."""

    name: str
    model: str
    parameters: int | None
    """Trainable parameters; None if it never joined."""
    device: str
    """As it said when it last joined; empty if it never joined."""
    train: tuple[Measured, ...]
    test: tuple[Measured, ...]
    pace: tuple[Paced, ...]
    final: Measured | None
    """The test measurement of the last epoch, not of the best; None if training did not get there."""
    restarts: int = 0
    """How often its worker was started again."""
    joins: int = 0
    """How often it joined: once, and again after each restart, resumption or broken connection."""
    missed_rounds: int = 0
    teacher: bool = False
    """How many rounds closed without it."""

    @property
    def step_seconds(self) -> float | None:
        """The median of the reported step times, waiting included; None where none was reported."""
        return _median(each.step_seconds for each in self.pace if each.step_seconds > 0)

    @property
    def wait_seconds(self) -> float | None:
        """The median of the reported waits for targets; None where no step was reported."""
        return _median(each.wait_seconds for each in self.pace if each.step_seconds > 0)


@dataclass(frozen=True)
class History:
    """One run."""

    experiment: Experiment
    info: RunInfo
    students: tuple[StudentHistory, ...]
    """In the experiment's order."""
    rounds: tuple[RoundsClosed, ...]
    """Spans of closed rounds that do not overlap, in order."""
    events: tuple[Happened, ...]
    """In order of time."""
    total_rounds: int | None
    """The rounds of the whole run; None if no student joined."""
    started: float | None = None
    """The time of the first record, in seconds since 1970-01-01 UTC; None if there is none."""
    ended: float | None = None
    """The time of the last record."""
    waits: Mapping[str, StudentWait] = field(default_factory=dict[str, StudentWait])
    """What was waited for each student, over all rounds."""

    @property
    def complete(self) -> bool:
        """Whether every student was tested after the last epoch."""
        return all(student.final is not None for student in self.students if not student.teacher)

    @property
    def closed_rounds(self) -> int:
        """How many rounds the records tell of."""
        return sum(map(_length, self.rounds))

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
        """The share of the last epoch's training samples that the mean of the students' probabilities classifies correctly.

        The last epoch that there are records of; None if there are none.
        """
        return next(
            (each.ensemble_accuracy for each in reversed(self.rounds) if each.ensemble_accuracy is not None), None
        )

    def epoch(self, rounds: int) -> float | None:
        """Returns the epoch reached after so many rounds; None if no student joined."""
        return rounds * self.experiment.training.epochs / self.total_rounds if self.total_rounds else None


def collect(
    experiment: Experiment, metrics: Iterable[Record], events: Iterable[Record] = (), info: RunInfo | None = None
) -> History:
    """Sorts a run's records into series.

    Args:
        experiment: what was run; its students come first, in its order, whether there are records of them or not.
        metrics: the records of ``metrics.jsonl``, in the file's order.
        events: the records of ``events.jsonl`` and ``supervisor.jsonl``, each in the file's order.
        info: the content of ``run.json``.
    """
    joined: dict[str, Joined] = {}
    measured: dict[tuple[str, str], dict[int, Measured]] = {}
    paced: dict[str, dict[int, Paced]] = {}
    spans: list[RoundsClosed] = []
    happened: list[Happened] = []
    names = dict.fromkeys(experiment.participants)
    times: list[float] = []
    joins: Counter[str] = Counter()
    for record in (*metrics, *events):
        times.append(record.time)
        match record:
            case Joined():
                joined[record.student] = record
                joins[record.student] += 1
                names.setdefault(record.student)
            case Measured():
                measured.setdefault((record.student, record.split), {})[record.round] = record
                names.setdefault(record.student)
            case Paced():
                paced.setdefault(record.student, {})[record.round] = record
                names.setdefault(record.student)
            case RoundsClosed():
                _add(spans, record)
            case Happened():
                happened.append(record)

    models = {each.name: each.model for each in (*experiment.students, *experiment.teachers)}
    students: list[StudentHistory] = []
    for name in names:
        test = _by_round(measured.get((name, "test"), {}))
        teacher = name in experiment.teacher_names  # is evaluated once, and is what it will be
        done = bool(test) and (teacher or test[-1].epoch >= experiment.training.epochs - 1e-6)
        join = joined.get(name)
        students.append(
            StudentHistory(
                name=name,
                model=models.get(name, join.model if join else ""),
                parameters=join.parameters if join else None,
                device=join.device if join else "",
                train=_by_round(measured.get((name, "train"), {})),
                test=test,
                pace=_by_round(paced.get(name, {})),
                final=test[-1] if done else None,
                restarts=sum(event.what == RESTARTED and event.student == name for event in happened),
                joins=joins[name],
                teacher=teacher,
                missed_rounds=sum(span.missed.get(name, 0) for span in spans),
            )
        )
    return History(
        experiment=experiment,
        info=info or RunInfo(),
        students=tuple(students),
        rounds=tuple(spans),
        events=tuple(sorted(happened, key=lambda event: event.time)),
        total_rounds=max((each.total_rounds for each in joined.values()), default=None),
        started=min(times, default=None),
        ended=max(times, default=None),
        waits=waited_for(spans),
    )


def read(folder: Path) -> History:
    """Reads a run folder.

    Raises:
        ExperimentError: ``experiment.yaml`` is missing or cannot be used.
        ValueError: a line of the records, or ``run.json``, is not of its form.
    """
    return collect(
        experiments.load(folder / "experiment.yaml"),
        records.read(folder / "metrics.jsonl"),
        (*records.read(folder / "events.jsonl"), *records.read(folder / SUPERVISOR_FILE)),
        RunInfo.read(folder),
    )


def waited_for(spans: Sequence[RoundsClosed]) -> dict[str, StudentWait]:
    """Returns what was waited for each student over several spans, summed."""
    rounds: Counter[str] = Counter()
    seconds: dict[str, float] = {}
    for span in spans:
        for name, wait in span.waits.items():
            rounds[name] += wait.rounds
            seconds[name] = seconds.get(name, 0.0) + wait.seconds
    return {name: StudentWait(rounds=rounds[name], seconds=seconds[name]) for name in seconds}


def median_wait(spans: Sequence[RoundsClosed]) -> float | None:
    """Returns the median of the spans' median waits, each counted once for every round of its span, in seconds.

    The records keep no wait of a single round, so this stands for the median over rounds. None without spans.
    """
    ordered = sorted(spans, key=lambda span: span.wait_p50)
    half = sum(map(_length, ordered)) / 2
    passed = 0
    for span in ordered:
        passed += _length(span)
        if passed >= half:
            return span.wait_p50
    return None


def longest_wait(spans: Sequence[RoundsClosed]) -> float | None:
    """Returns the longest time from a round's first contribution to its last, in seconds; None without spans."""
    return max((span.wait_max for span in spans), default=None)


def _add(spans: list[RoundsClosed], span: RoundsClosed) -> None:
    """Adds a span in its place, instead of those it overlaps."""
    if not spans or spans[-1].last < span.first:
        spans.append(span)
        return
    spans[:] = [each for each in spans if each.last < span.first or each.first > span.last]
    place = len(spans)
    while place and spans[place - 1].first > span.first:
        place -= 1
    spans.insert(place, span)


def _length(span: RoundsClosed) -> int:
    return span.last - span.first + 1


def _by_round(series: Mapping[int, _T]) -> tuple[_T, ...]:
    return tuple(series[number] for number in sorted(series))


def _median(values: Iterable[float]) -> float | None:
    known = list(values)
    return statistics.median(known) if known else None
