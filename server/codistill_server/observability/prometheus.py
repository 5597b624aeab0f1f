"""The run's metrics for Prometheus.

Gauges are read off the observations at the moment of a scrape, so a student that left without finishing takes its
series along; one that finished keeps its final values until the server ends, as they are often scraped only then.
Counters and histograms are the server's own and only ever grow; those of a student stay while it is away, as they count
its absences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from codistill import __version__
from codistill.v1 import distillation_pb2 as pb
from codistill_server.observability.state import RunState

__all__ = ["registry"]

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


def registry(observations: RunState, snapshot: Callable[[], pb.Run]) -> CollectorRegistry:
    """Returns a registry that shows one run, and hooks its histograms up to the run's observations.

    Args:
        observations: the run's.
        snapshot: where the run stands; called from whatever thread serves a scrape.
    """
    made = CollectorRegistry()
    run = observations.name
    wait = Histogram(
        "codistill_round_wait_seconds",
        "Time from a round's first contribution to its last.",
        ["run"],
        buckets=_BUCKETS,
        registry=made,
    ).labels(run)
    seconds = Histogram(
        "codistill_round_seconds",
        "Time from the closing of one round to the closing of the next.",
        ["run"],
        buckets=_BUCKETS,
        registry=made,
    ).labels(run)

    def on_round(waited: float, took: float) -> None:
        wait.observe(waited)
        seconds.observe(took)

    observations.on_round = on_round
    made.register(_RunCollector(observations, snapshot))
    return made


class _RunCollector(Collector):
    """Reads the observations when Prometheus asks."""

    def __init__(self, observations: RunState, snapshot: Callable[[], pb.Run]) -> None:
        self._observations = observations
        self._snapshot = snapshot

    def collect(self) -> Iterable[Metric]:
        observations = self._observations
        run = observations.name
        state = self._snapshot()
        students = [student for student in state.students if student.state in _VISIBLE]

        def gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"codistill_{name}", text, labels=["run", *labels])

        info = gauge("run_info", "What runs; always 1.", "method", "version")
        info.add_metric([run, observations.method, __version__], 1)
        yield info

        accuracy = gauge(
            "student_accuracy_ratio", "Share of samples classified correctly.", "student", "model", "split"
        )
        loss = gauge("student_loss", "Mean cross-entropy, in nats.", "student", "model", "split")
        distillation = gauge(
            "student_distillation_loss", "Mean of the method's term, weight included.", "student", "model", "split"
        )
        trained = gauge("round", "Rounds that a student has trained.", "student", "model")
        behind = gauge("student_behind_rounds", "Rounds that a student is behind the frontier.", "student", "model")
        parameters = gauge("student_parameters", "Trainable parameters.", "student", "model")
        step = gauge("student_step_seconds", "Median training step, waiting included.", "student", "model")
        waiting = gauge("student_wait_seconds", "Median wait of a step for its targets.", "student", "model")
        for student in students:
            who = [run, student.name, student.model]
            for measurement in student.measurements:
                split = _SPLITS[measurement.split]
                accuracy.add_metric([*who, split], measurement.accuracy)
                loss.add_metric([*who, split], measurement.loss)
                if measurement.HasField("distillation_loss"):
                    distillation.add_metric([*who, split], measurement.distillation_loss)
            trained.add_metric(who, student.round)
            behind.add_metric(who, max(0, state.frontier - student.round))
            parameters.add_metric(who, student.parameters)
            step.add_metric(who, student.step_seconds)
            waiting.add_metric(who, student.wait_seconds)
        yield from (accuracy, loss, distillation, trained, behind, parameters, step, waiting)

        ensemble = gauge(
            "ensemble_accuracy_ratio",
            "Share of the last epoch's training samples that the mean of the students' probabilities classifies correctly.",
            "split",
        )
        if state.HasField("ensemble_accuracy"):
            ensemble.add_metric([run, "train"], state.ensemble_accuracy)
        yield ensemble
        disagreement = gauge(
            "disagreement_ratio",
            "Share of the last epoch's training samples on which two students differ.",
            "first",
            "second",
        )
        shown = {student.name for student in students}
        for pair in state.disagreements:
            if pair.first in shown and pair.second in shown:
                disagreement.add_metric([run, pair.first, pair.second], pair.ratio)
        yield disagreement

        yield _one(
            gauge("students_present", "Students whose session is open."), run, _count(state, pb.STUDENT_STATE_PRESENT)
        )
        yield _one(gauge("students_expected", "Students of the experiment."), run, len(state.students))
        yield _one(
            gauge("students_finished", "Students that trained all rounds."),
            run,
            _count(state, pb.STUDENT_STATE_FINISHED),
        )
        yield _one(gauge("frontier_round", "First round that is not closed."), run, state.frontier)
        yield _one(gauge("expected_rounds", "Rounds of the whole run."), run, state.total_rounds)
        yield _one(gauge("open_round_wait_seconds", "How long the open round has waited."), run, state.waiting_seconds)
        waited_for = gauge("waited_for", "1 for a student that the open round waits for, else 0.", "student")
        for student in state.students:
            waited_for.add_metric([run, student.name], float(student.name in state.waiting_for))
        yield waited_for
        states = gauge(
            "student_state",
            "1 for the state that a student is in, 0 for the others; failed is one that left with an error, as when it diverged.",
            "student",
            "state",
        )
        for student in state.students:
            for number, name in _STATES.items():
                states.add_metric([run, student.name, name], float(student.state == number))
        yield states

        rounds = CounterMetricFamily("codistill_rounds", "Rounds closed by this server.", labels=["run"])
        rounds.add_metric([run], observations.closed_rounds)
        yield rounds
        alone = CounterMetricFamily(
            "codistill_rounds_without_target", "Rounds trained on labels alone for want of a quorum.", labels=["run"]
        )
        alone.add_metric([run], observations.rounds_without_targets)
        yield alone
        missed = CounterMetricFamily(
            "codistill_student_missed_rounds", "Rounds closed without a student.", labels=["run", "student", "model"]
        )
        joins = CounterMetricFamily(
            "codistill_student_joins",
            "Sessions opened by a student's workers; every one after the first is a restart or a reconnection.",
            labels=["run", "student", "model"],
        )
        for student in state.students:
            missed.add_metric([run, student.name, student.model], student.missed_rounds)
            joins.add_metric([run, student.name, student.model], student.joins)
        yield from (missed, joins)
        rejected = CounterMetricFamily(
            "codistill_contributions_rejected", "Contributions turned away.", labels=["run", "reason"]
        )
        for status, count in dict(observations.rejected).items():
            rejected.add_metric([run, status.name.lower()], count)
        yield rejected
        traffic = CounterMetricFamily(
            "codistill_bytes", "Bytes of contributions received and of replies sent.", labels=["run", "direction"]
        )
        traffic.add_metric([run, "received"], observations.bytes_in)
        traffic.add_metric([run, "sent"], observations.bytes_out)
        yield traffic


def _count(state: pb.Run, wanted: pb.StudentState.ValueType) -> int:
    return sum(student.state == wanted for student in state.students)


def _one(family: GaugeMetricFamily, run: str, value: float) -> GaugeMetricFamily:
    family.add_metric([run], value)
    return family
