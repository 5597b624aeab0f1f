"""Runs side by side: paired gains, correct spreads, nothing silently dropped."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codistill.config.experiment import parse
from codistill.rundir import history
from codistill.rundir.records import Joined, Measured, Record
from codistill_deploy.compare import statistics as comparisons
from codistill_deploy.compare.index import ComparisonIndex, IndexedRun
from codistill_deploy.compare.statistics import Comparison, MethodRun

SETTINGS = "name: tiny\ndata: {dataset: digits}\ntraining: {epochs: 2}\nstudents: [{name: a, model: mlp}, {name: b, model: cnn}]\n"


def run(method: str, seed: int, accuracies: Mapping[str, Sequence[float]]) -> MethodRun:
    """A run in which each student was tested after as many epochs as it has accuracies, out of 2."""
    records: list[Record] = []
    for name, values in accuracies.items():
        records.append(
            Joined(
                time=0,
                participant=name,
                model="",
                parameters={"a": 10, "b": 20}[name],
                device="cpu",
                total_rounds=10,
                total_steps=10,
            )
        )
        records += [
            Measured(
                time=0,
                participant=name,
                split="test",
                steps_trained=5 * epoch,
                epochs_trained=epoch,
                accuracy=value,
                loss=1,
            )
            for epoch, value in enumerate(values, 1)
        ]
    return MethodRun(method, seed, history.collect(parse(SETTINGS), records), f"{method}/{seed}")


def two_seeds() -> Comparison:
    return comparisons.summarise(
        [
            run("kdcl/linear", 0, {"a": (0.9, 0.80), "b": (0.5, 0.70)}),
            run("kdcl/linear", 1, {"a": (0.9, 0.84), "b": (0.5, 0.72)}),
            run("independent", 0, {"a": (0.9, 0.75), "b": (0.5, 0.71)}),
            run("independent", 1, {"a": (0.1, 0.77), "b": (0.5, 0.70)}),
        ]
    )


def test_gains_are_paired_by_seed_and_taken_after_the_last_epoch() -> None:
    table = two_seeds()
    first, second = table.students
    alone, together = first.results["independent"], first.results["kdcl/linear"]
    assert table.methods == ("independent", "kdcl/linear")
    assert (first.name, first.model, first.parameters) == ("a", "mlp", 10)
    assert alone.accuracy.values == {0: 0.75, 1: 0.77}
    assert alone.gain is None
    assert together.accuracy.mean == pytest.approx(0.82)
    assert together.gain is not None
    assert together.gain.values == pytest.approx({0: 0.05, 1: 0.07})
    assert together.gain.mean == pytest.approx(0.06)
    assert together.gain.deviation == pytest.approx(statistics.stdev([0.05, 0.07]))
    assert second.results["kdcl/linear"].gain is not None
    assert second.results["kdcl/linear"].gain.values == pytest.approx({0: -0.01, 1: 0.02})


def test_the_mean_is_over_students_within_a_seed_and_then_over_seeds() -> None:
    means = two_seeds().means
    assert means["independent"].accuracy.values == pytest.approx({0: 0.73, 1: 0.735})
    gain = means["kdcl/linear"].gain
    assert gain is not None
    assert gain.values == pytest.approx({0: 0.02, 1: 0.045})
    assert gain.mean == pytest.approx(0.0325)
    assert gain.deviation == pytest.approx(statistics.stdev([0.02, 0.045]))
    assert [spread.mean for spread in means["independent"].curve.accuracy] == pytest.approx([0.5, 0.7325])


def test_one_seed_has_no_spread() -> None:
    table = comparisons.summarise(
        [run("independent", 7, {"a": (0, 0.5), "b": (0, 0.5)}), run("dml", 7, {"a": (0, 0.6), "b": (0, 0.6)})]
    )
    gain = table.students[0].results["dml"].gain
    assert gain is not None
    assert gain.mean == pytest.approx(0.1)
    assert gain.deviation is None
    assert table.seeds == (7,)


def test_without_independent_there_is_no_gain() -> None:
    table = comparisons.summarise(
        [run("dml", 0, {"a": (0, 0.6), "b": (0, 0.5)}), run("kdcl/naive", 0, {"a": (0, 0.7), "b": (0, 0.8)})]
    )
    assert table.baseline is None
    assert table.others == ("dml", "kdcl/naive")
    assert all(result.gain is None for student in table.students for result in student.results.values())
    assert table.means["kdcl/naive"].accuracy.mean == pytest.approx(0.75)


def test_an_incomplete_run_is_named_and_its_complete_students_still_count() -> None:
    table = comparisons.summarise(
        [
            run("independent", 0, {"a": (0, 0.5), "b": (0, 0.5)}),
            run("independent", 1, {"a": (0, 0.6), "b": (0, 0.6)}),
            run("dml", 0, {"a": (0, 0.55), "b": (0.4,)}),
            run("dml", 1, {"a": (0, 0.65)}),
            MethodRun("dml", 2, None, "dml/2", "it has not begun"),
        ]
    )
    assert [(run.method, run.seed, run.path, run.reason) for run in table.incomplete] == [
        ("dml", 0, "dml/0", "b was last tested at epoch 1; the last epoch is 2"),
        ("dml", 1, "dml/1", "b was never tested; the last epoch is 2"),
        ("dml", 2, "dml/2", "it has not begun"),
    ]
    first, second = table.students
    assert first.results["dml"].gain is not None
    assert first.results["dml"].gain.values == pytest.approx({0: 0.05, 1: 0.05})
    assert second.results["dml"].accuracy.mean is None
    assert second.results["dml"].curve.epochs == ()
    assert table.means["dml"].accuracy.values == {}
    assert table.seeds == (0, 1, 2)


def test_curves_hold_each_seed_where_all_complete_runs_were_tested() -> None:
    runs = [
        run("independent", 0, {"a": (0.2, 0.5)}),
        run("independent", 1, {"a": (0.4, 0.7)}),
        run("independent", 2, {"a": (0.9,)}),
    ]
    curve = comparisons.summarise(runs).students[0].results["independent"].curve
    assert curve.epochs == (1.0, 2.0)
    assert [spread.mean for spread in curve.accuracy] == pytest.approx([0.3, 0.6])
    assert curve.accuracy[0].deviation == pytest.approx(statistics.stdev([0.2, 0.4]))


def test_two_runs_of_one_method_and_seed_are_refused() -> None:
    with pytest.raises(ValueError, match="more than one run of method 'dml' with seed 3"):
        comparisons.summarise([run("dml", 3, {}), run("dml", 3, {})])


def test_nothing_to_compare_is_an_empty_table() -> None:
    table = comparisons.summarise([])
    assert (table.students, table.means, table.incomplete) == ((), {}, ())


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=5))
def test_the_mean_gain_is_the_difference_of_the_means(seeds: list[tuple[float, float, float, float]]) -> None:
    runs = [run("independent", seed, {"a": (0, one), "b": (0, two)}) for seed, (one, two, _, _) in enumerate(seeds)]
    runs += [run("dml", seed, {"a": (0, one), "b": (0, two)}) for seed, (_, _, one, two) in enumerate(seeds)]
    means = comparisons.summarise(runs).means
    alone, together, gain = means["independent"].accuracy.mean, means["dml"].accuracy.mean, means["dml"].gain
    assert alone is not None
    assert together is not None
    assert gain is not None
    assert gain.mean == pytest.approx(together - alone, abs=1e-12)


def test_runs_that_cannot_be_read_come_with_their_problem(tmp_path: Path) -> None:
    paths = ("good", "torn", "none")
    for name in ("good", "torn"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "experiment.yaml").write_text(SETTINGS)
    (tmp_path / "torn" / "metrics.jsonl").write_text("nonsense\n")
    index = ComparisonIndex(
        experiment="x",
        methods=("dml",),
        seeds=(0, 1, 2),
        runs=tuple(IndexedRun(method="dml", seed=seed, path=path) for seed, path in enumerate(paths)),
    )
    good, torn, none = comparisons.read_runs(tmp_path, index)
    assert good.history is not None
    assert torn.history is None
    assert "metrics.jsonl: line 1" in torn.problem
    assert none.history is None
    assert none.problem == "it has not begun: its folder has no experiment.yaml"
