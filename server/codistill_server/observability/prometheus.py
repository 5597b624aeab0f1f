"""The run's metrics for Prometheus: a table with one row for each metric.

Gauges are read from the run's state at each scrape. The series of a student that left without finishing end. One that
finished keeps its final values until the server ends, as they are often scraped only then. Counters and histograms are the
server's own and only ever grow. Those of a student stay while it is away, as they count its absences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from codistill import __version__
from codistill.v1 import distillation_pb2 as pb
from codistill_server.observability.state import RunState

__all__ = ["HISTOGRAMS", "METRICS", "RunMetric", "registry"]

_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)
_SPLITS = {pb.SPLIT_TRAIN: "train", pb.SPLIT_TEST: "test"}
_VISIBLE = (pb.STUDENT_STATE_PRESENT, pb.STUDENT_STATE_FINISHED)
_STATES = {
    pb.STUDENT_STATE_EXPECTED: "expected",
    pb.STUDENT_STATE_PRESENT: "present",
    pb.STUDENT_STATE_ABSENT: "absent",
    pb.STUDENT_STATE_FINISHED: "finished",
    pb.STUDENT_STATE_FAILED: "failed",
}


@dataclass(frozen=True)
class _Scrape:
    """The input of one scrape: the server's own counts and a snapshot of the run."""

    counts: RunState
    run: pb.Run

    @cached_property
    def students(self) -> Sequence[pb.StudentStatus]:
        """The students whose gauges are shown."""
        return [student for student in self.run.students if student.state in _VISIBLE]


_Samples: TypeAlias = Iterable[tuple[Sequence[str], float]]


@dataclass(frozen=True)
class RunMetric:
    """A row of the table.

    Attributes:
        name: without the prefix `codistill_`, and of a counter without `_total`.
        text: its help.
        samples: returns the values of the labels and the value of each series.
        labels: the names of the labels besides `run`.
        family: gauge or counter.
    """

    name: str
    text: str
    samples: Callable[[_Scrape], _Samples]
    labels: Sequence[str] = ()
    family: type[GaugeMetricFamily] | type[CounterMetricFamily] = GaugeMetricFamily


def _one(value: Callable[[_Scrape], float]) -> Callable[[_Scrape], _Samples]:
    """Return a reader of one series without labels."""
    return lambda scrape: [((), value(scrape))]


def _by_student(value: Callable[[pb.Run, pb.StudentStatus], float]) -> Callable[[_Scrape], _Samples]:
    """Return a reader of one series for each visible student, with the labels :data:`_STUDENT`."""
    return lambda scrape: [((student.name, student.model), value(scrape.run, student)) for student in scrape.students]


def _of_every_student(value: Callable[[pb.StudentStatus], float]) -> Callable[[_Scrape], _Samples]:
    """Return a reader of one series for each student, visible or not, with the labels :data:`_STUDENT`."""
    return lambda scrape: [((student.name, student.model), value(student)) for student in scrape.run.students]


def _by_split(value: Callable[[pb.Measurement], float | None]) -> Callable[[_Scrape], _Samples]:
    """Return a reader of each visible student's latest measurements, with the labels :data:`_SPLIT`."""

    def samples(scrape: _Scrape) -> Iterator[tuple[Sequence[str], float]]:
        for student in scrape.students:
            for measurement in student.measurements:
                found = value(measurement)
                if found is not None:
                    yield (student.name, student.model, _SPLITS[measurement.split]), found

    return samples


def _distillation_loss(measurement: pb.Measurement) -> float | None:
    return measurement.distillation_loss if measurement.HasField("distillation_loss") else None


def _ensemble_accuracy(scrape: _Scrape) -> _Samples:
    return [(("train",), scrape.run.ensemble_accuracy)] if scrape.run.HasField("ensemble_accuracy") else []


def _disagreements(scrape: _Scrape) -> _Samples:
    visible = {student.name for student in scrape.students}
    for pair in scrape.run.disagreements:
        if pair.first in visible and pair.second in visible:
            yield (pair.first, pair.second), pair.ratio


def _count(state: pb.StudentState.ValueType) -> Callable[[_Scrape], _Samples]:
    """Return a reader of the number of students in a state."""
    return _one(lambda scrape: sum(student.state == state for student in scrape.run.students))


def _waited_for(scrape: _Scrape) -> _Samples:
    for student in scrape.run.students:
        yield (student.name,), float(student.name in scrape.run.waiting_for)


def _states(scrape: _Scrape) -> _Samples:
    for student in scrape.run.students:
        for state, name in _STATES.items():
            yield (student.name, name), float(student.state == state)


def _rejected(scrape: _Scrape) -> _Samples:
    for status, count in dict(scrape.counts.rejected).items():
        yield (status.name.lower(),), count


_STUDENT = ("student", "model")
_SPLIT = (*_STUDENT, "split")
METRICS = (
    RunMetric(
        "run_info",
        "What runs; always 1.",
        lambda scrape: [((scrape.counts.method, __version__), 1)],
        ("method", "version"),
    ),
    RunMetric(
        "student_accuracy_ratio",
        "Share of samples classified correctly.",
        _by_split(lambda measurement: measurement.accuracy),
        _SPLIT,
    ),
    RunMetric("student_loss", "Mean cross-entropy, in nats.", _by_split(lambda measurement: measurement.loss), _SPLIT),
    RunMetric(
        "student_distillation_loss",
        "Mean of the method's term, weight included.",
        _by_split(_distillation_loss),
        _SPLIT,
    ),
    RunMetric("round", "Rounds that a student has trained.", _by_student(lambda _, student: student.round), _STUDENT),
    RunMetric(
        "student_behind_rounds",
        "Rounds that a student is behind the frontier.",
        _by_student(lambda run, student: max(0, run.frontier - student.round)),
        _STUDENT,
    ),
    RunMetric(
        "student_parameters", "Trainable parameters.", _by_student(lambda _, student: student.parameters), _STUDENT
    ),
    RunMetric(
        "student_step_seconds",
        "Median training step, waiting included.",
        _by_student(lambda _, student: student.step_seconds),
        _STUDENT,
    ),
    RunMetric(
        "student_wait_seconds",
        "Median wait of a step for its targets.",
        _by_student(lambda _, student: student.wait_seconds),
        _STUDENT,
    ),
    RunMetric(
        "ensemble_accuracy_ratio",
        "Share of the last epoch's training samples that the mean of the students' probabilities classifies correctly.",
        _ensemble_accuracy,
        ("split",),
    ),
    RunMetric(
        "disagreement_ratio",
        "Share of the last epoch's training samples on which two students differ.",
        _disagreements,
        ("first", "second"),
    ),
    RunMetric("students_present", "Students whose session is open.", _count(pb.STUDENT_STATE_PRESENT)),
    RunMetric("students_expected", "Students of the experiment.", _one(lambda scrape: len(scrape.run.students))),
    RunMetric("students_finished", "Students that trained all rounds.", _count(pb.STUDENT_STATE_FINISHED)),
    RunMetric("frontier_round", "First round that is not closed.", _one(lambda scrape: scrape.run.frontier)),
    RunMetric("expected_rounds", "Rounds of the whole run.", _one(lambda scrape: scrape.run.total_rounds)),
    RunMetric(
        "open_round_wait_seconds",
        "How long the open round has waited.",
        _one(lambda scrape: scrape.run.waiting_seconds),
    ),
    RunMetric("waited_for", "1 for a student that the open round waits for, else 0.", _waited_for, ("student",)),
    RunMetric(
        "student_state",
        "1 for the state that a student is in, 0 for the others; failed is one that left with an error, as when it diverged.",
        _states,
        ("student", "state"),
    ),
    RunMetric(
        "rounds",
        "Rounds closed by this server.",
        _one(lambda scrape: scrape.counts.closed_rounds),
        family=CounterMetricFamily,
    ),
    RunMetric(
        "rounds_without_target",
        "Rounds trained on labels alone for want of a quorum.",
        _one(lambda scrape: scrape.counts.rounds_without_targets),
        family=CounterMetricFamily,
    ),
    RunMetric(
        "student_missed_rounds",
        "Rounds closed without a student.",
        _of_every_student(lambda student: student.missed_rounds),
        _STUDENT,
        CounterMetricFamily,
    ),
    RunMetric(
        "student_joins",
        "Sessions opened by a student's workers; every one after the first is a restart or a reconnection.",
        _of_every_student(lambda student: student.joins),
        _STUDENT,
        CounterMetricFamily,
    ),
    RunMetric("contributions_rejected", "Contributions turned away.", _rejected, ("reason",), CounterMetricFamily),
    RunMetric(
        "bytes",
        "Bytes of contributions received and of replies sent.",
        lambda scrape: [(("received",), scrape.counts.bytes_in), (("sent",), scrape.counts.bytes_out)],
        ("direction",),
        CounterMetricFamily,
    ),
)

HISTOGRAMS = {
    "round_wait_seconds": "Time from a round's first contribution to its last.",
    "round_seconds": "Time from the closing of one round to the closing of the next.",
}


def registry(state: RunState, snapshot: Callable[[], pb.Run]) -> CollectorRegistry:
    """Return a registry of one run's metrics, and connect its histograms to the run's state.

    Args:
        state: the run's.
        snapshot: returns the run's state as a message; called from the thread that serves a scrape.
    """
    metrics = CollectorRegistry()

    histograms = {
        name: Histogram(f"codistill_{name}", text, ["run"], buckets=_BUCKETS, registry=metrics).labels(state.name)
        for name, text in HISTOGRAMS.items()
    }

    def on_round(waited: float, took: float) -> None:
        histograms["round_wait_seconds"].observe(waited)
        histograms["round_seconds"].observe(took)

    state.on_round = on_round
    metrics.register(_RunCollector(state, snapshot))
    return metrics


class _RunCollector(Collector):
    """Reads the table's metrics at each scrape."""

    def __init__(self, state: RunState, snapshot: Callable[[], pb.Run]) -> None:
        self._state = state
        self._snapshot = snapshot

    def collect(self) -> Iterable[Metric]:
        scrape = _Scrape(self._state, self._snapshot())
        for metric in METRICS:
            family = metric.family(f"codistill_{metric.name}", metric.text, labels=["run", *metric.labels])
            for labels, value in metric.samples(scrape):
                family.add_metric([self._state.name, *labels], value)
            yield family
