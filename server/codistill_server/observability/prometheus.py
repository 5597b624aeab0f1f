"""The run's metrics for Prometheus: a table with one row for each metric.

Gauges are read from the run's state at each scrape. The series of a participant that left without finishing end. One that
finished keeps its final values until the server ends, as they are often scraped only then. Counters and histograms are the
server's own and only ever grow. Those of a participant stay while it is away, as they count the rounds that it misses.

To add a metric of the server, touch two places: where it is counted, and the table here. To add one that a participant
reports, touch four: the proto, where it is measured, the worker's ``participant.py``, and the table. In the proto the field
has one name in ``ReportRequest`` and ``ParticipantStatus``, as the run's state copies what both have. ``make docs`` then
writes the page.
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
from codistill.wire.times import seconds
from codistill.wire.words import word, words
from codistill_server.observability.state import RunState

__all__ = ["HISTOGRAMS", "METRICS", "RunMetric", "registry"]

_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)
_VISIBLE = (pb.PARTICIPANT_STATE_CONNECTED, pb.PARTICIPANT_STATE_FINISHED)


@dataclass(frozen=True)
class _Scrape:
    """The input of one scrape: the server's own counts and a snapshot of the run."""

    counts: RunState
    run: pb.Run

    @cached_property
    def visible(self) -> Sequence[pb.ParticipantStatus]:
        """The participants whose gauges are shown."""
        return [status for status in self.run.participants if status.state in _VISIBLE]


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


def _by_participant(value: Callable[[pb.ParticipantStatus], float | None]) -> Callable[[_Scrape], _Samples]:
    """Return a reader of one series for each visible participant with a value, with the labels :data:`_PARTICIPANT`."""

    def samples(scrape: _Scrape) -> Iterator[tuple[Sequence[str], float]]:
        for status in scrape.visible:
            found = value(status)
            if found is not None:
                yield (status.name, status.model), found

    return samples


def _of_every_participant(value: Callable[[pb.ParticipantStatus], float]) -> Callable[[_Scrape], _Samples]:
    """Return a reader of one series for each participant, visible or not, with the labels :data:`_PARTICIPANT`."""
    return lambda scrape: [((status.name, status.model), value(status)) for status in scrape.run.participants]


def _fact(value: Callable[[pb.Run, pb.ParticipantStatus], bool]) -> Callable[[_Scrape], _Samples]:
    """Return a reader of 1 or 0 for each participant, visible or not, with the label `participant`."""
    return lambda scrape: [((status.name,), float(value(scrape.run, status))) for status in scrape.run.participants]


def _by_split(value: Callable[[pb.Measurement], float | None]) -> Callable[[_Scrape], _Samples]:
    """Return a reader of each visible participant's latest measurements, with the labels :data:`_SPLIT`."""

    def samples(scrape: _Scrape) -> Iterator[tuple[Sequence[str], float]]:
        for status in scrape.visible:
            for measurement in status.measurements:
                found = value(measurement)
                if found is not None:
                    yield (status.name, status.model, word(pb.Split, measurement.split)), found

    return samples


def _distillation_loss(measurement: pb.Measurement) -> float | None:
    return measurement.distillation_loss if measurement.HasField("distillation_loss") else None


def _behind(scrape: _Scrape) -> _Samples:
    if scrape.counts.exchanges:
        for status in scrape.visible:
            yield (status.name, status.model), max(0, scrape.run.frontier - status.round)


def _ensemble_accuracy(scrape: _Scrape) -> _Samples:
    return [(("train",), scrape.run.ensemble_accuracy)] if scrape.run.HasField("ensemble_accuracy") else []


def _disagreements(scrape: _Scrape) -> _Samples:
    visible = {status.name for status in scrape.visible}
    for pair in scrape.run.disagreements:
        if pair.first in visible and pair.second in visible:
            yield (pair.first, pair.second), pair.ratio


def _states(scrape: _Scrape) -> _Samples:
    for status in scrape.run.participants:
        now = word(pb.ParticipantState, status.state)
        for state in words(pb.ParticipantState):
            yield (status.name, state), float(state == now)


def _rejected(scrape: _Scrape) -> _Samples:
    for status, count in dict(scrape.counts.rejected).items():
        yield (status.name.lower(),), count


_PARTICIPANT = ("participant", "model")
_SPLIT = (*_PARTICIPANT, "split")
METRICS = (
    RunMetric(
        "run_info",
        "What runs; always 1.",
        lambda scrape: [((scrape.counts.method, __version__), 1)],
        ("method", "version"),
    ),
    RunMetric(
        "run_steps",
        "Steps of each student; 0 until a participant has joined.",
        _one(lambda scrape: scrape.run.total_steps),
    ),
    RunMetric(
        "run_steps_trained",
        "Steps before the frontier. While no round is closed, the steps that the slowest student has trained.",
        _one(lambda scrape: scrape.run.steps_trained),
    ),
    RunMetric(
        "run_rounds",
        "Rounds of the whole run; 0 until a participant has joined, and where nothing is exchanged.",
        _one(lambda scrape: scrape.run.total_rounds),
    ),
    RunMetric(
        "frontier_round",
        "First round that is not closed; 0 where nothing is exchanged.",
        _one(lambda scrape: scrape.run.frontier),
    ),
    RunMetric(
        "open_round_wait_seconds",
        "How long the open round has waited.",
        _one(lambda scrape: seconds(scrape.run.waiting_time)),
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
    RunMetric(
        "participant_state",
        f"1 for the state of a participant, 0 for the others: {', '.join(words(pb.ParticipantState))}.",
        _states,
        ("participant", "state"),
    ),
    RunMetric(
        "participant_awaited",
        "1 while the frontier waits for a participant, 0 while rounds close without it.",
        _fact(lambda _, status: status.awaited),
        ("participant",),
    ),
    RunMetric(
        "waiting_for",
        "1 while the open round waits for this participant's contribution, else 0.",
        _fact(lambda run, status: status.name in run.waiting_for),
        ("participant",),
    ),
    RunMetric(
        "participant_accuracy_ratio",
        "Share of samples classified correctly.",
        _by_split(lambda measurement: measurement.accuracy),
        _SPLIT,
    ),
    RunMetric(
        "participant_loss", "Mean cross-entropy, in nats.", _by_split(lambda measurement: measurement.loss), _SPLIT
    ),
    RunMetric(
        "participant_distillation_loss",
        "Mean of the method's term, weight included.",
        _by_split(_distillation_loss),
        _SPLIT,
    ),
    RunMetric(
        "participant_steps_trained",
        "Steps that a student has trained, or a teacher taught.",
        _by_participant(lambda status: status.steps_trained),
        _PARTICIPANT,
    ),
    RunMetric(
        "participant_behind_rounds",
        "Closed rounds that a participant has not learned from yet. There is no series where nothing is exchanged.",
        _behind,
        _PARTICIPANT,
    ),
    RunMetric(
        "participant_parameters",
        "Trainable parameters.",
        _by_participant(lambda status: status.parameters),
        _PARTICIPANT,
    ),
    RunMetric(
        "participant_step_seconds",
        "Median training step, waiting included.",
        _by_participant(lambda status: seconds(status.step_time) if status.HasField("step_time") else None),
        _PARTICIPANT,
    ),
    RunMetric(
        "participant_wait_seconds",
        "Median wait of a step for its targets.",
        _by_participant(lambda status: seconds(status.wait_time) if status.HasField("wait_time") else None),
        _PARTICIPANT,
    ),
    RunMetric(
        "participant_missed_rounds",
        "Rounds closed without a participant.",
        _of_every_participant(lambda status: status.missed_rounds),
        _PARTICIPANT,
        CounterMetricFamily,
    ),
    RunMetric(
        "participant_joins",
        "Sessions opened by a participant's workers; every one after the first is a restart or a reconnection.",
        _of_every_participant(lambda status: status.joins),
        _PARTICIPANT,
        CounterMetricFamily,
    ),
    RunMetric(
        "rounds_closed",
        "Rounds closed by this server.",
        _one(lambda scrape: scrape.counts.closed_rounds),
        family=CounterMetricFamily,
    ),
    RunMetric(
        "rounds_without_targets",
        "Rounds closed without targets, in which students learned from the labels alone.",
        _one(lambda scrape: scrape.counts.rounds_without_targets),
        family=CounterMetricFamily,
    ),
    RunMetric("contributions_rejected", "Contributions rejected.", _rejected, ("reason",), CounterMetricFamily),
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
