from __future__ import annotations

import shutil
import subprocess

import pytest
import torch
from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from codistill import __version__
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.tensors import encode
from codistill.wire.times import duration
from codistill.wire.words import words
from codistill_server.errors import RequestRejected
from codistill_server.observability.prometheus import HISTOGRAMS, METRICS, registry
from server.support import BATCH, CLASSES, TOTAL_ROUNDS, Run, contribution, independent_experiment, make_experiment

# What the server knows of a participant, whether it is there or not.
FACTS = {"codistill_waiting_for", "codistill_participant_state", "codistill_participant_awaited"}


class Scraped:
    """A run with its metrics."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._registry = registry(run.run_state, run.coordinator.snapshot)

    @property
    def text(self) -> str:
        return generate_latest(self._registry).decode()

    @property
    def families(self) -> dict[str, Metric]:
        return {family.name: family for family in text_string_to_metric_families(self.text)}

    def value(self, name: str, **labels: str) -> float | None:
        """Return a sample of the run, or None if there is no such series."""
        wanted = {"run": "small", **labels}
        found = [
            sample.value
            for family in self.families.values()
            for sample in family.samples
            if sample.name == f"codistill_{name}" and sample.labels == wanted
        ]
        assert len(found) <= 1
        return found[0] if found else None

    def series_of(self, participant: str) -> set[str]:
        """Return the names of the series that tell how a participant does."""
        return {
            sample.name
            for family in self.families.values()
            for sample in family.samples
            if participant
            in (sample.labels.get("participant"), sample.labels.get("first"), sample.labels.get("second"))
        } - FACTS

    def state_of(self, participant: str) -> list[str]:
        """Return the states that a participant is said to be in."""
        return [
            sample.labels["state"]
            for sample in self.families["codistill_participant_state"].samples
            if sample.labels["participant"] == participant and sample.value == 1
        ]

    def count(self, state: str) -> int:
        """Return the number of participants in a state."""
        states = self.families["codistill_participant_state"].samples
        return sum(sample.value == 1 for sample in states if sample.labels["state"] == state)


@pytest.fixture
def scraped() -> Scraped:
    """Three students that have trained, exchanged, reported, and been turned away once."""
    run = Run(make_experiment(("ant", "bee", "cat")))
    made = Scraped(run)
    run.join_all()
    for number in range(3):
        run.clock.now += 0.004
        run.close_round(number)
    for position, student in enumerate(run.experiment.names):
        measured = [
            pb.Measurement(split=pb.SPLIT_TRAIN, steps_trained=3, accuracy=0.5, loss=1.5, distillation_loss=0.25),
            pb.Measurement(split=pb.SPLIT_TEST, steps_trained=3, accuracy=0.25, loss=2.5),
        ]
        run.report(
            student,
            steps_trained=3 - position,
            epochs_trained=1,
            round=3 - position,
            measurements=measured,
            step_time=duration(0.5),
            wait_time=duration(0.125),
        )
    broken = contribution(run.experiment, "cat", 3)
    broken.batch.outputs["logits"].CopyFrom(encode(torch.full((BATCH, CLASSES), torch.nan), "float32"))
    with pytest.raises(RequestRejected):
        run.send("cat", broken)
    run.join("cat", 3, steps_trained=3)
    run.contribute("ant", 3)
    run.clock.now += 2
    return made


def test_the_documented_names_are_all_there(scraped: Scraped) -> None:
    samples = {sample.name for family in scraped.families.values() for sample in family.samples}
    assert samples >= {
        f"codistill_{name}"
        for name in (
            "participant_accuracy_ratio",
            "participant_loss",
            "ensemble_accuracy_ratio",
            "disagreement_ratio",
            "participant_steps_trained",
            "rounds_closed_total",
            "round_wait_seconds_bucket",
            "round_seconds_bucket",
            "participant_behind_rounds",
            "participant_state",
            "participant_awaited",
            "waiting_for",
            "contributions_rejected_total",
            "bytes_total",
            "run_info",
        )
    }
    assert all(name.startswith("codistill_") for name in samples)


def test_labels_are_few_and_never_a_step(scraped: Scraped) -> None:
    labels = {label for family in scraped.families.values() for sample in family.samples for label in sample.labels}
    assert labels == {
        "run", "participant", "model", "split", "first", "second", "reason", "direction", "method", "version", "le", "state"
    }  # fmt: skip
    for family in scraped.families.values():
        for sample in family.samples:
            assert sample.labels["run"] == "small"


def test_values(scraped: Scraped) -> None:
    ant = {"participant": "ant", "model": "mlp"}
    assert scraped.value("run_info", method="kdcl/min_logit", version=__version__) == 1
    assert scraped.value("participant_accuracy_ratio", **ant, split="train") == 0.5
    assert scraped.value("participant_accuracy_ratio", **ant, split="test") == 0.25
    assert scraped.value("participant_loss", **ant, split="test") == 2.5
    assert scraped.value("participant_distillation_loss", **ant, split="train") == 0.25
    assert scraped.value("participant_distillation_loss", **ant, split="test") is None
    assert scraped.value("participant_step_seconds", **ant) == 0.5
    assert scraped.value("participant_wait_seconds", **ant) == 0.125
    assert scraped.value("participant_parameters", **ant) == 10
    names = scraped.run.experiment.names
    steps = [scraped.value("participant_steps_trained", participant=name, model="mlp") for name in names]
    assert steps == [3, 2, 3]
    behind = [scraped.value("participant_behind_rounds", participant=name, model="mlp") for name in names]
    assert behind == [0, 1, 0]
    assert [scraped.count(state) for state in words(pb.ParticipantState)] == [0, 3, 0, 0, 0]
    assert scraped.value("frontier_round") == scraped.value("run_steps_trained") == 3
    assert scraped.value("run_rounds") == scraped.value("run_steps") == TOTAL_ROUNDS
    assert scraped.value("open_round_wait_seconds") == 2
    assert [scraped.value("waiting_for", participant=name) for name in names] == [0, 1, 1]
    assert [scraped.value("participant_awaited", participant=name) for name in names] == [1, 1, 1]
    assert scraped.value("rounds_closed_total") == 3
    assert scraped.value("rounds_without_targets_total") == 0
    joins = [scraped.value("participant_joins_total", participant=name, model="mlp") for name in ("ant", "cat")]
    assert joins == [1, 2]
    assert scraped.value("participant_missed_rounds_total", **ant) == 0
    rejected = [
        scraped.value("contributions_rejected_total", reason=reason)
        for reason in ("aborted", "failed_precondition", "invalid_argument")
    ]
    assert rejected == [0, 0, 1]
    assert scraped.value("bytes_total", direction="received") == scraped.run.run_state.bytes_in > 0
    assert scraped.value("bytes_total", direction="sent") == scraped.run.run_state.bytes_out > 0
    disagreement = scraped.value("disagreement_ratio", first="ant", second="cat")
    assert disagreement is not None
    assert 0 <= disagreement <= 1


def test_histograms_begin_at_half_a_millisecond(scraped: Scraped) -> None:
    for name in ("round_wait_seconds", "round_seconds"):
        buckets = [
            (float(sample.labels["le"]), sample.value)
            for sample in scraped.families[f"codistill_{name}"].samples
            if sample.name.endswith("_bucket")
        ]
        assert [edge for edge, _ in buckets][:3] == [0.0005, 0.001, 0.002]
        assert [edge for edge, _ in buckets][-2:] == [300, float("inf")]
        assert scraped.value(f"{name}_count") == 2
    assert scraped.value("round_seconds_sum") == pytest.approx(0.008)
    assert scraped.value("round_seconds_bucket", le="0.002") == 0
    assert scraped.value("round_seconds_bucket", le="0.005") == 2
    assert scraped.value("round_wait_seconds_bucket", le="0.0005") == 2


SERVERS_OWN = {"codistill_participant_joins_total", "codistill_participant_missed_rounds_total"}


@pytest.mark.parametrize("how", ["stopped", "failed", "disconnected"])
def test_a_participant_that_left_takes_its_series_along(scraped: Scraped, how: str) -> None:
    run = scraped.run
    others = {name: scraped.series_of(name) for name in ("ant", "cat")}
    assert len(scraped.series_of("bee")) >= 9
    if how == "disconnected":
        run.coordinator.close_stream(run.session_ids["bee"], run.inboxes["bee"])
    else:
        run.leave("bee", pb.LEAVE_REASON_STOPPED if how == "stopped" else pb.LEAVE_REASON_FAILED)
    assert scraped.series_of("bee") == SERVERS_OWN
    assert scraped.state_of("bee") == ["failed" if how == "failed" else "disconnected"]
    assert {name: scraped.series_of(name) for name in others} == others
    assert scraped.count("connected") == 2
    run.join("bee", 2, steps_trained=2)
    assert scraped.value("participant_steps_trained", participant="bee", model="mlp") == 2


def test_one_that_finished_keeps_them(scraped: Scraped) -> None:
    scraped.run.close_rounds()
    before = scraped.series_of("bee")
    scraped.run.leave("bee", pb.LEAVE_REASON_FINISHED)
    assert scraped.series_of("bee") == before
    assert [scraped.count(state) for state in ("connected", "finished")] == [2, 1]
    assert [scraped.state_of(name) for name in ("ant", "bee")] == [["connected"], ["finished"]]


def test_before_anybody_came_there_are_zeros_and_no_gauges_of_participants() -> None:
    scraped = Scraped(Run())
    assert scraped.value("rounds_closed_total") == 0
    assert scraped.value("run_steps") == scraped.value("run_rounds") == 0
    assert scraped.count("connected") == 0
    assert scraped.value("bytes_total", direction="sent") == 0
    assert scraped.value("contributions_rejected_total", reason="invalid_argument") == 0
    assert scraped.value("round_seconds_count") == 0
    assert scraped.value("ensemble_accuracy_ratio", split="train") is None
    assert scraped.series_of("ant") == SERVERS_OWN
    assert scraped.state_of("ant") == ["expected"]


def test_who_missed_which_rounds() -> None:
    run = Run(make_experiment(exchange={"on_absence": "proceed", "round_deadline": 3}))
    scraped = Scraped(run)
    run.join_all()
    run.contribute("bee", 0)
    run.clock.now += 3
    run.coordinator.tick()
    assert scraped.value("participant_missed_rounds_total", participant="ant", model="mlp") == 1
    assert scraped.value("participant_missed_rounds_total", participant="bee", model="mlp") == 0
    assert [scraped.value("participant_awaited", participant=name) for name in ("ant", "bee")] == [0, 1]
    assert scraped.value("rounds_without_targets_total") == 1


def test_where_nothing_is_exchanged_there_are_steps_and_no_rounds() -> None:
    run = Run(independent_experiment(("ant", "bee")))
    scraped = Scraped(run)
    for name, steps in (("ant", 8), ("bee", 5)):
        run.join(name, total_rounds=0)
        run.report(name, steps_trained=steps)
    assert scraped.value("run_steps_trained") == 5
    assert scraped.value("run_steps") == TOTAL_ROUNDS
    assert scraped.value("run_rounds") == scraped.value("frontier_round") == scraped.value("rounds_closed_total") == 0
    assert "codistill_participant_behind_rounds" not in scraped.series_of("ant")


def test_an_unknown_pace_has_no_series() -> None:
    run = Run()
    scraped = Scraped(run)
    run.join("ant")
    run.report("ant", steps_trained=1)
    assert not scraped.series_of("ant") & {"codistill_participant_step_seconds", "codistill_participant_wait_seconds"}


def test_a_metric_is_named_for_what_it_counts() -> None:
    """A row is a family of one name, and the ending that Prometheus keeps for counters is added by it."""
    assert len({metric.name for metric in METRICS} | HISTOGRAMS.keys()) == len(METRICS) + len(HISTOGRAMS)
    for metric in METRICS:
        assert metric.text.endswith(".")
        assert not metric.name.endswith("_total")
        assert ("participant" in metric.labels) == metric.name.startswith(("participant_", "waiting_for"))


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian's prometheus) is not installed")
def test_promtool_finds_nothing_to_say(scraped: Scraped) -> None:
    for text in (scraped.text, Scraped(Run()).text):
        checked = subprocess.run(
            ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60, check=False
        )
        assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
