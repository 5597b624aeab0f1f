"""One run's records as series: every measurement once, the later line standing."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codistill.config.experiment import ExperimentError
from codistill.rundir import history, spans
from codistill.rundir.info import RunInfo
from codistill.rundir.layout import RunLayout
from codistill.rundir.records import Happened, Paced, Record
from protos.rundir.support import experiment, joined, measured, span


def test_a_repeated_measurement_stands_in_its_place_with_its_later_value() -> None:
    run = history.collect(
        experiment(),
        [
            measured("a", 10, 0.5),
            measured("a", 20, 0.6),
            measured("b", 20, 0.1),
            measured("a", 10, 0.55),
            measured("a", 20, 0.4, "train"),
        ],
    )
    first, second = run.participants
    assert [(each.steps_trained, each.accuracy) for each in first.test] == [(10, 0.55), (20, 0.6)]
    assert [each.accuracy for each in first.train] == [0.4]
    assert [each.accuracy for each in second.test] == [0.1]


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.sampled_from(["train", "test"]), st.integers(1, 6), st.floats(0, 1)),
        max_size=40,
    )
)
def test_the_series_are_those_of_a_dictionary_filled_in_order(lines: list[tuple[str, str, int, float]]) -> None:
    run = history.collect(experiment(), [measured(name, at, value, split) for name, split, at, value in lines])
    expected = {(name, split, at): value for name, split, at, value in lines}
    found = {
        (each.participant, each.split, each.steps_trained): each.accuracy
        for one in run.participants
        for each in (*one.train, *one.test)
    }
    assert found == expected
    for one in run.participants:
        assert [each.steps_trained for each in one.test] == sorted(each.steps_trained for each in one.test)


def test_the_final_measurement_is_the_last_epochs_not_the_best() -> None:
    run = history.collect(experiment(), [measured("a", 30, 0.9), measured("a", 40, 0.8), measured("b", 30, 0.7)])
    first, second = run.participants
    assert first.final is not None
    assert first.final.accuracy == 0.8
    assert second.final is None
    assert not run.complete


def test_participants_come_in_the_experiments_order_and_are_there_without_records() -> None:
    run = history.collect(experiment(), [joined("b", "cpu"), joined("b", "cuda:0"), joined("guest")])
    assert [(each.name, each.model, each.device, each.parameters) for each in run.participants] == [
        ("a", "mlp", "", None),
        ("b", "cnn", "cuda:0", 1000),
        ("guest", "model of guest", "cpu", 1000),
    ]
    assert (run.total_rounds, run.total_steps) == (20, 40)
    assert run.epoch(15) == 1.5
    assert history.collect(experiment(), []).epoch(15) is None


def test_steps_that_are_unknown_are_not_in_the_medians() -> None:
    paces = [(1, 0.0, 0.0), (2, 0.2, 0.1), (3, 0.4, 0.0), (4, 0.3, 0.2)]
    run = history.collect(
        experiment(),
        [
            Paced(time=0, participant="a", steps_trained=at, step_seconds=step, wait_seconds=wait)
            for at, step, wait in paces
        ],
    )
    assert run.participants[0].step_seconds == pytest.approx(0.3)
    assert run.participants[0].wait_seconds == pytest.approx(0.1)
    assert run.participants[1].step_seconds is None


def test_events_are_in_order_of_time_and_time_runs_from_first_to_last_record() -> None:
    events: list[Record] = [Happened(time=9.0, what="finished"), Happened(time=3.0, what="skipped", participant="a")]
    run = history.collect(experiment(), [joined("a", time=2.0), measured("a", 10, 0.5, time=5.0)], events)
    assert [each.what for each in run.events] == ["skipped", "finished"]
    assert (run.started, run.ended, run.seconds) == (2.0, 9.0, 7.0)
    assert history.collect(experiment(), []).seconds is None


def test_the_ensembles_accuracy_is_the_last_known() -> None:
    spans = [span(0, 9).model_copy(update={"ensemble_accuracy": 0.25}), span(10, 19)]
    assert history.collect(experiment(), spans).ensemble_accuracy == 0.25
    assert history.collect(experiment(), []).ensemble_accuracy is None


def test_a_folder_reads_as_its_records(tmp_path: Path) -> None:
    lines: list[Record] = [joined("a"), measured("a", 40, 0.75), span(0, 39)]
    (tmp_path / "experiment.yaml").write_text(experiment().to_yaml())
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f"{line.model_dump_json()}\n" for line in lines) + '{"kind": "measu'
    )
    (tmp_path / "events.jsonl").write_text(Happened(time=1, what="joined", participant="a").model_dump_json() + "\n")
    (tmp_path / "run.json").write_text(
        '{"created": "2025-01-02T03:04:05Z", "mode": "grpc", "command": ["codistill", "run"]}'
    )
    run = history.read(tmp_path)
    assert run == history.collect(experiment(), lines, [Happened(time=1, what="joined", participant="a")], run.info)
    assert run.info.command == ("codistill", "run")
    assert run.info.created is not None
    assert run.info.created.isoformat() == "2025-01-02T03:04:05+00:00"


def test_only_the_experiment_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"experiment\.yaml"):
        history.read(tmp_path)
    (tmp_path / "experiment.yaml").write_text(experiment().to_yaml())
    run = history.read(tmp_path)
    assert run.info == RunInfo()
    assert [each.test for each in run.participants] == [(), ()]
    assert run.started is None


def test_a_run_json_of_another_form_names_the_field(tmp_path: Path) -> None:
    (tmp_path / "experiment.yaml").write_text(experiment().to_yaml())
    (tmp_path / "run.json").write_text('{"mode": "telepathy"}')
    with pytest.raises(ValueError, match=r"run\.json: mode: .*'grpc' or 'in-process'"):
        history.read(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json: Invalid JSON"):
        history.read(tmp_path)


def test_what_the_supervisor_saw_stands_among_the_servers_events(tmp_path: Path) -> None:
    (tmp_path / "experiment.yaml").write_text(experiment().to_yaml())
    (tmp_path / "events.jsonl").write_text(
        "".join(Happened(time=time, what="joined", participant="b").model_dump_json() + "\n" for time in (1.0, 3.0))
    )
    lines = [
        Happened(time=2.0, what=history.RESTARTED, participant="b", message="was killed by SIGKILL"),
        Happened(time=4.0, what=history.RESTARTED, message="the server was killed by SIGKILL"),
        Happened(time=5.0, what="gave_up", participant="b"),
    ]
    path = RunLayout(tmp_path).supervisor_file
    path.write_text("".join(line.model_dump_json() + "\n" for line in lines) + '{"kind": "ev')
    run = history.read(tmp_path)
    assert [(event.time, event.what) for event in run.events] == [
        (1.0, "joined"),
        (2.0, "restarted"),
        (3.0, "joined"),
        (4.0, "restarted"),
        (5.0, "gave_up"),
    ]
    assert [each.restarts for each in run.participants] == [0, 1]


def test_what_was_missed_is_summed_over_the_spans_that_stand() -> None:
    missed = [
        span(first, first + 4).model_copy(update={"missed": by_name, "without_targets": alone})
        for first, by_name, alone in ((0, {"a": 2}, 1), (5, {"b": 5}, 4), (5, {"a": 1, "b": 3}, 2))
    ]
    run = history.collect(experiment(), [joined("a"), *missed, joined("a")])
    assert [each.missed_rounds for each in run.participants] == [3, 3]
    assert [each.joins for each in run.participants] == [2, 0]
    assert run.rounds_without_targets == 3


@given(st.lists(st.integers(0, 40), min_size=1, max_size=300), st.integers(4, 12))
def test_a_bounded_series_keeps_its_newest_its_best_and_even_gaps(scores: list[int], limit: int) -> None:
    collected = history.Collector(experiment(), limit)
    for number, score in enumerate(scores):
        collected.add(measured("a", number, score / 40))
    participant = collected.history(RunInfo()).participants[0]
    kept = [each.steps_trained for each in participant.test]
    assert len(kept) <= limit
    assert kept[0] == 0
    assert kept[-1] == len(scores) - 1
    assert len({later - earlier for earlier, later in itertools.pairwise(kept[:-1])}) <= 1
    assert participant.test_count == len(scores)
    assert participant.best is not None
    assert (participant.best.accuracy, participant.best.steps_trained) == (max(scores) / 40, scores.index(max(scores)))


def test_merged_spans_keep_totals_and_the_longest_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_UNMERGED", 2)
    closed = [
        span(
            5 * number, 5 * number + 4, 0.001 * number, 3.0 if number == 7 else 0.1, a=(2, 0.25), b=(3, 0.5)
        ).model_copy(update={"missed": {"b": 1}, "without_targets": 1, "ensemble_accuracy": number / 100})
        for number in range(60)
    ]
    whole, bounded = history.Collector(experiment()), history.Collector(experiment(), 10)
    for each in closed:
        whole.add(each)
        bounded.add(each)
    one, other = whole.history(RunInfo()), bounded.history(RunInfo())
    assert len(other.rounds) <= 10
    assert other.rounds[-1] == one.rounds[-1]
    assert other.waits == one.waits
    for what in ("closed_rounds", "rounds_without_targets", "ensemble_accuracy"):
        assert getattr(other, what) == getattr(one, what)
    assert spans.longest_wait(other.rounds) == 3.0
    assert [each.missed_rounds for each in other.participants] == [0, 60]


def test_of_events_a_bounded_history_keeps_the_newest_and_counts_all_restarts() -> None:
    collected = history.Collector(experiment(), 5)
    for number in range(20):
        collected.add(Happened(time=number, what=history.RESTARTED, participant="a" if number % 2 else ""))
    run = collected.history(RunInfo())
    assert [event.time for event in run.events] == [15, 16, 17, 18, 19]
    assert (run.server_restarts, run.participants[0].restarts) == (10, 10)
