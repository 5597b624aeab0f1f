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
from codistill_server.errors import RequestRejected
from codistill_server.observability.prometheus import registry
from server.support import BATCH, CLASSES, TOTAL_ROUNDS, Run, contribution, make_experiment


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

    def series_of(self, student: str) -> set[str]:
        """Return the names of the series that tell how a student does."""
        return {
            sample.name
            for family in self.families.values()
            for sample in family.samples
            if student in (sample.labels.get("student"), sample.labels.get("first"), sample.labels.get("second"))
        } - {"codistill_waited_for", "codistill_student_state"}

    def state_of(self, student: str) -> list[str]:
        """Return the states that a student is said to be in."""
        return [
            sample.labels["state"]
            for sample in self.families["codistill_student_state"].samples
            if sample.labels["student"] == student and sample.value == 1
        ]


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
            pb.Measurement(split=pb.SPLIT_TRAIN, round=3, accuracy=0.5, loss=1.5, distillation_loss=0.25),
            pb.Measurement(split=pb.SPLIT_TEST, round=3, accuracy=0.25, loss=2.5),
        ]
        run.report(student, round=3 - position, epoch=1, measurements=measured, step_seconds=0.5, wait_seconds=0.125)
    broken = contribution(run.experiment, "cat", 3)
    broken.batch.outputs["logits"].CopyFrom(encode(torch.full((BATCH, CLASSES), torch.nan), "float32"))
    with pytest.raises(RequestRejected):
        run.send("cat", broken)
    run.join("cat", 3)
    run.contribute("ant", 3)
    run.clock.now += 2
    return made


def test_the_documented_names_are_all_there(scraped: Scraped) -> None:
    samples = {sample.name for family in scraped.families.values() for sample in family.samples}
    assert samples >= {
        f"codistill_{name}"
        for name in (
            "student_accuracy_ratio",
            "student_loss",
            "ensemble_accuracy_ratio",
            "disagreement_ratio",
            "round",
            "rounds_total",
            "round_wait_seconds_bucket",
            "round_seconds_bucket",
            "student_behind_rounds",
            "students_present",
            "contributions_rejected_total",
            "bytes_total",
            "run_info",
        )
    }
    assert all(name.startswith("codistill_") for name in samples)


def test_labels_are_few_and_never_a_step(scraped: Scraped) -> None:
    labels = {label for family in scraped.families.values() for sample in family.samples for label in sample.labels}
    assert labels == {
        "run", "student", "model", "split", "first", "second", "reason", "direction", "method", "version", "le", "state"
    }  # fmt: skip
    for family in scraped.families.values():
        for sample in family.samples:
            assert sample.labels["run"] == "small"


def test_values(scraped: Scraped) -> None:
    ant = {"student": "ant", "model": "mlp"}
    assert scraped.value("run_info", method="kdcl/min_logit", version=__version__) == 1
    assert scraped.value("student_accuracy_ratio", **ant, split="train") == 0.5
    assert scraped.value("student_accuracy_ratio", **ant, split="test") == 0.25
    assert scraped.value("student_loss", **ant, split="test") == 2.5
    assert scraped.value("student_distillation_loss", **ant, split="train") == 0.25
    assert scraped.value("student_distillation_loss", **ant, split="test") is None
    assert scraped.value("student_step_seconds", **ant) == 0.5
    assert scraped.value("student_wait_seconds", **ant) == 0.125
    assert scraped.value("student_parameters", **ant) == 10
    assert [scraped.value("round", student=name, model="mlp") for name in ("ant", "bee", "cat")] == [3, 2, 3]
    behind = [scraped.value("student_behind_rounds", student=name, model="mlp") for name in ("ant", "bee", "cat")]
    assert behind == [0, 1, 0]
    assert [scraped.value(f"students_{which}") for which in ("present", "expected", "finished")] == [3, 3, 0]
    assert scraped.value("frontier_round") == 3
    assert scraped.value("expected_rounds") == TOTAL_ROUNDS
    assert scraped.value("open_round_wait_seconds") == 2
    assert [scraped.value("waited_for", student=name) for name in ("ant", "bee", "cat")] == [0, 1, 1]
    assert scraped.value("rounds_total") == 3
    assert scraped.value("rounds_without_target_total") == 0
    assert [scraped.value("student_joins_total", student=name, model="mlp") for name in ("ant", "cat")] == [1, 2]
    assert scraped.value("student_missed_rounds_total", **ant) == 0
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


SERVERS_OWN = {"codistill_student_joins_total", "codistill_student_missed_rounds_total"}


@pytest.mark.parametrize("how", ["stopped", "failed", "disconnected"])
def test_a_student_that_left_takes_its_series_along(scraped: Scraped, how: str) -> None:
    run = scraped.run
    others = {name: scraped.series_of(name) for name in ("ant", "cat")}
    assert len(scraped.series_of("bee")) >= 9
    if how == "disconnected":
        run.coordinator.close_stream(run.sessions["bee"], run.inboxes["bee"])
    else:
        run.leave("bee", pb.LEAVE_REASON_STOPPED if how == "stopped" else pb.LEAVE_REASON_FAILED)
    assert scraped.series_of("bee") == SERVERS_OWN
    assert scraped.state_of("bee") == ["failed" if how == "failed" else "absent"]
    assert {name: scraped.series_of(name) for name in others} == others
    assert scraped.value("students_present") == 2
    run.join("bee", 2)
    assert scraped.value("round", student="bee", model="mlp") == 2


def test_one_that_finished_keeps_them(scraped: Scraped) -> None:
    before = scraped.series_of("bee")
    scraped.run.leave("bee", pb.LEAVE_REASON_FINISHED)
    assert scraped.series_of("bee") == before
    assert [scraped.value(f"students_{which}") for which in ("present", "finished")] == [2, 1]
    assert [scraped.state_of(name) for name in ("ant", "bee")] == [["present"], ["finished"]]


def test_before_anybody_came_there_are_zeros_and_no_students() -> None:
    scraped = Scraped(Run())
    assert scraped.value("rounds_total") == 0
    assert scraped.value("students_present") == 0
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
    assert scraped.value("student_missed_rounds_total", student="ant", model="mlp") == 1
    assert scraped.value("student_missed_rounds_total", student="bee", model="mlp") == 0
    assert scraped.value("rounds_without_target_total") == 1


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian's prometheus) is not installed")
def test_promtool_finds_nothing_to_say(scraped: Scraped) -> None:
    for text in (scraped.text, Scraped(Run()).text):
        checked = subprocess.run(
            ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60, check=False
        )
        assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
