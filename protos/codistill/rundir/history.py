"""What one run folder says happened: typed series, each measurement once.

A student that resumes from a checkpoint repeats rounds, and a server that lost its last journalled rounds closes them
again, so ``metrics.jsonl`` may speak of the same thing twice. The later line stands. :func:`collect` is pure;
:func:`read` is the same from a folder, and a :class:`Follower` reads on in one while a run goes.
"""

from __future__ import annotations

import itertools
import statistics
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from codistill.config import experiment as experiments
from codistill.config.experiment import Experiment
from codistill.rundir import records
from codistill.rundir.info import RunInfo
from codistill.rundir.layout import RunLayout
from codistill.rundir.records import Happened, Joined, Measured, Paced, Record, RoundsClosed, StudentWait

__all__ = [
    "RESTARTED",
    "Follower",
    "History",
    "StudentHistory",
    "collect",
    "longest_wait",
    "median_wait",
    "read",
    "waited_for",
]

_R = TypeVar("_R", Measured, Paced)

RESTARTED = "restarted"
"""The event of a process that ended and is started again."""

_CHUNK = 2**20
_UNMERGED = 50  # of the newest spans: a server that lost its last rounds closes them again


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
    best: Measured | None = None
    """The test measurement with the highest accuracy, the first of several."""
    train_count: int = 0
    """How many measurements there were, those included that a bounded history has left out."""
    test_count: int = 0
    """The same for the test measurements."""
    restarts: int = 0
    """How often its worker was started again."""
    joins: int = 0
    """How often it joined: once, and again after each restart, resumption or broken connection."""
    missed_rounds: int = 0
    """How many rounds closed without it."""
    teacher: bool = False
    """Whether it only teaches."""

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
    server_restarts: int = 0
    """How often the server was started again."""

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
    collected = _Collected(experiment)
    for record in (*metrics, *events):
        collected.add(record)
    return collected.history(info or RunInfo())


def read(folder: Path) -> History:
    """Reads a run folder.

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


class Follower:
    """Reads on in a run folder's records as they are written, in bounded memory.

    Of a series longer than the limit evenly spaced measurements are kept, the newest and the best among them; spans of
    rounds are merged, and of events the newest are kept.

    Args:
        experiment: the run's.
        folder: the run's.
        limit: the most measurements of a series, spans of rounds, and events.
    """

    def __init__(self, experiment: Experiment, folder: Path, limit: int = 1000) -> None:
        self._layout = RunLayout(folder)
        self._collected = _Collected(experiment, limit)
        self._read = dict.fromkeys(self._layout.record_files, 0)
        self._lines = dict.fromkeys(self._layout.record_files, 0)

    @property
    def written(self) -> str:
        """Names what is written by now: another name, another history."""
        return _version(map(_size, self._read))

    @property
    def version(self) -> str:
        """Names what is read by now: :attr:`written`, once all of that is read."""
        return _version(self._read.values())

    def advance(self) -> History:
        """Reads all that was written since, and returns the history so far.

        Raises:
            ValueError: a line of the records, or ``run.json``, is not of its form.
            OSError: a file cannot be read.
        """
        for path in self._read:
            while self._read_on(path):
                pass
        return self._collected.history(RunInfo.read(self._layout.info_file))

    def _read_on(self, path: Path) -> bool:
        """Takes in the next lines of a file; returns whether there were any."""
        if _size(path) <= self._read[path]:
            return False
        with path.open("rb") as file:
            file.seek(self._read[path])
            content = file.read(_CHUNK)
        lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
        for line in lines:
            self._collected.add(records.parse(line, path, self._lines[path] + 1))
            self._read[path] += len(line)
            self._lines[path] += 1
        return bool(lines)


class _Series(Generic[_R]):
    """One student's records of a kind, each round once; with a limit, evenly spaced ones of them."""

    def __init__(self, limit: int | None) -> None:
        self.count = 0
        self.best: Measured | None = None  # of those that are left out
        self._limit = limit
        self._stride = 1
        self._kept: dict[int, tuple[int, _R]] = {}
        self._newest = -1

    def add(self, record: _R) -> None:
        """Takes in a record; a later one of a round stands for the earlier one."""
        known = self._kept.get(record.round)
        if known is None:
            if self._stride > 1 and record.round < self._newest:
                return  # the round was left out before
            known = (self.count, record)
            self.count += 1
            if self._newest in self._kept and self._kept[self._newest][0] % self._stride:
                self._leave_out(self._newest)
        self._newest = max(self._newest, record.round)
        self._kept[record.round] = (known[0], record)
        if self._limit is not None and len(self._kept) > self._limit:
            self._stride *= 2
            for number in [each for each, (index, _) in self._kept.items() if index % self._stride]:
                if number != self._newest:
                    self._leave_out(number)

    def _leave_out(self, number: int) -> None:
        _, record = self._kept.pop(number)
        if isinstance(record, Measured):
            self.best = _better(self.best, record)

    @property
    def records(self) -> tuple[_R, ...]:
        """The records that are kept, in the order of their rounds."""
        return tuple(self._kept[number][1] for number in sorted(self._kept))


class _Collected:
    """Sorts records into series as they come."""

    def __init__(self, experiment: Experiment, limit: int | None = None) -> None:
        self._experiment = experiment
        self._limit = limit
        self._joined: dict[str, Joined] = {}
        self._measured: dict[tuple[str, str], _Series[Measured]] = {}
        self._paced: dict[str, _Series[Paced]] = {}
        self._spans: list[RoundsClosed] = []
        self._happened: deque[Happened] = deque(maxlen=limit)
        self._restarts: Counter[str] = Counter()
        self._joins: Counter[str] = Counter()
        self._names = dict.fromkeys(experiment.participants)
        self._started: float | None = None
        self._ended: float | None = None

    def add(self, record: Record) -> None:
        """Takes in one record."""
        self._started = record.time if self._started is None else min(self._started, record.time)
        self._ended = record.time if self._ended is None else max(self._ended, record.time)
        match record:
            case Joined():
                self._joined[record.student] = record
                self._joins[record.student] += 1
                self._names.setdefault(record.student)
            case Measured():
                self._series(record.student, record.split).add(record)
                self._names.setdefault(record.student)
            case Paced():
                self._paces(record.student).add(record)
                self._names.setdefault(record.student)
            case RoundsClosed():
                _add(self._spans, record)
                if self._limit is not None and len(self._spans) > self._limit:
                    self._spans[:-_UNMERGED] = _merged_by_two(self._spans[:-_UNMERGED])
            case Happened():
                self._happened.append(record)
                self._restarts[record.student] += record.what == RESTARTED

    def history(self, info: RunInfo) -> History:
        """Returns what was taken in so far."""
        return History(
            experiment=self._experiment,
            info=info,
            students=tuple(self._student(name) for name in self._names),
            rounds=tuple(self._spans),
            events=tuple(sorted(self._happened, key=lambda event: event.time)),
            total_rounds=max((each.total_rounds for each in self._joined.values()), default=None),
            started=self._started,
            ended=self._ended,
            waits=waited_for(self._spans),
            server_restarts=self._restarts[""],
        )

    def _student(self, name: str) -> StudentHistory:
        experiment = self._experiment
        models = {each.name: each.model for each in (*experiment.students, *experiment.teachers)}
        join = self._joined.get(name)
        train, test = self._series(name, "train"), self._series(name, "test")
        tested = test.records
        teacher = name in experiment.teacher_names  # is evaluated once, and is what it will be
        done = bool(tested) and (teacher or tested[-1].epoch >= experiment.training.epochs - 1e-6)
        best = test.best
        for each in tested:
            best = _better(best, each)
        return StudentHistory(
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

    def _series(self, student: str, split: str) -> _Series[Measured]:
        return self._measured.setdefault((student, split), _Series[Measured](self._limit))

    def _paces(self, student: str) -> _Series[Paced]:
        return self._paced.setdefault(student, _Series[Paced](self._limit))


def waited_for(spans: Sequence[RoundsClosed]) -> dict[str, StudentWait]:
    """Returns what was waited for each student over several spans, summed."""
    rounds: Counter[str] = Counter()
    seconds: dict[str, float] = {}
    for span in spans:
        for name, wait in span.waits.items():
            rounds[name] += wait.rounds
            seconds[name] = seconds.get(name, 0.0) + wait.seconds
    return {name: StudentWait.model_construct(rounds=rounds[name], seconds=seconds[name]) for name in seconds}


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


def _merged_by_two(spans: Sequence[RoundsClosed]) -> list[RoundsClosed]:
    """Merges neighbours; totals and the longest wait stay what they were."""
    merged: list[RoundsClosed] = []
    for first, second in itertools.zip_longest(spans[::2], spans[1::2]):
        if second is None or second.first != first.last + 1:
            merged += [first] if second is None else [first, second]
            continue
        both = (first, second)
        known = [span.ensemble_accuracy for span in both if span.ensemble_accuracy is not None]
        merged.append(
            RoundsClosed(
                time=second.time,
                first=first.first,
                last=second.last,
                seconds=first.seconds + second.seconds,
                wait_p50=median_wait(both) or 0.0,
                wait_max=max(first.wait_max, second.wait_max),
                waits=waited_for(both),
                ensemble_accuracy=known[-1] if known else None,
                disagreement={**first.disagreement, **second.disagreement},
                missed=dict(Counter(first.missed) + Counter(second.missed)),
                without_targets=first.without_targets + second.without_targets,
            )
        )
    return merged


def _better(one: Measured | None, other: Measured) -> Measured:
    if one is None or other.accuracy > one.accuracy:
        return other
    return one if one.accuracy > other.accuracy or one.round <= other.round else other


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _version(sizes: Iterable[int]) -> str:
    return "-".join(map(str, sizes))


def _median(values: Iterable[float]) -> float | None:
    known = list(values)
    return statistics.median(known) if known else None
