"""The statistics of a comparison: how much each student gains by learning together.

The accuracy of a run is that of the test measurement after the last epoch, never that of the best one. A gain is
paired: a student's accuracy with a method less its own accuracy alone with the same seed. Every spread is the sample
standard deviation over seeds (n − 1), and there is none with one seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from codistill.config.experiment import ExperimentError
from codistill.rundir import history
from codistill.rundir.history import History, ParticipantHistory
from codistill.rundir.layout import RunLayout
from codistill.rundir.records import Measured
from codistill_deploy.compare.index import ComparisonIndex

__all__ = [
    "BASELINE",
    "Comparison",
    "Curve",
    "Incomplete",
    "MethodRun",
    "Result",
    "Spread",
    "StudentComparison",
    "read_runs",
    "summarise",
]

BASELINE = "independent"
"""The method that gains are measured against."""

_SIDE_BY_SIDE = 3
_Key = TypeVar("_Key", int, float)


@dataclass(frozen=True)
class MethodRun:
    """One run to compare."""

    method: str
    seed: int
    history: History | None
    """None where the run cannot be read; `problem` says why."""
    path: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Spread:
    """One number for each seed."""

    values: Mapping[int, float]
    """By seed; a seed that is missing has no value."""

    @property
    def mean(self) -> float | None:
        """The mean over seeds; None without any."""
        return statistics.fmean(self.values.values()) if self.values else None

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation over seeds; None with fewer than two."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Curve:
    """Test accuracy against epochs over the complete runs, where all of them were tested."""

    epochs: tuple[float, ...]
    accuracy: tuple[Spread, ...]


@dataclass(frozen=True)
class Result:
    """The accuracy of one student, or of the mean of all, with one method."""

    accuracy: Spread
    gain: Spread | None
    """In units of accuracy (0.01 is one percentage point); None for the baseline and where there is none."""
    curve: Curve


@dataclass(frozen=True)
class StudentComparison:
    """One student across methods."""

    name: str
    model: str
    parameters: int | None
    results: Mapping[str, Result]
    """By method."""


@dataclass(frozen=True)
class Incomplete:
    """A run that cannot be counted in full."""

    method: str
    seed: int
    path: str
    reason: str


@dataclass(frozen=True)
class Comparison:
    """The statistics of a comparison: everything that its table and its report show."""

    methods: tuple[str, ...]
    """`independent` first, where it is among them, then in the order of the runs."""
    seeds: tuple[int, ...]
    students: tuple[StudentComparison, ...]
    means: Mapping[str, Result]
    """By method: for each seed the mean over students, of those seeds for which all students have a value."""
    incomplete: tuple[Incomplete, ...]
    runs: tuple[MethodRun, ...]
    left_out: Mapping[str, str]
    """Methods that were not run, and why."""

    @property
    def baseline(self) -> str | None:
        """`independent`, where it is among the methods."""
        return BASELINE if BASELINE in self.methods else None

    @property
    def others(self) -> tuple[str, ...]:
        """The methods but for the baseline."""
        return tuple(method for method in self.methods if method != BASELINE)

    @property
    def many(self) -> bool:
        """Whether there are too many methods for a column each: tables and pictures have a row for each."""
        return len(self.others) > _SIDE_BY_SIDE


def summarise(runs: Iterable[MethodRun], left_out: Mapping[str, str] | None = None) -> Comparison:
    """Return the comparison of runs: the accuracies, gains and curves of every student with every method.

    A student without a measurement after the last epoch has no value for that method and seed. Its run is named in
    `incomplete`. The other students of the run keep their values.

    Args:
        runs: the runs.
        left_out: methods that were not run, and why.

    Raises:
        ValueError: two runs are of the same method and seed.
    """
    runs = tuple(runs)
    _require_one_of_each(runs)
    methods = tuple(sorted(dict.fromkeys(run.method for run in runs), key=lambda method: method != BASELINE))
    students = tuple(_compare_student(name, runs, methods) for name in _student_names(runs))
    means = {method: _mean([student.results[method].accuracy for student in students]) for method in methods}
    mean_curves = {method: _mean_curve([student.results[method].curve for student in students]) for method in methods}
    return Comparison(
        methods=methods,
        seeds=tuple(sorted({run.seed for run in runs})),
        students=students,
        means=_results(means, mean_curves),
        incomplete=tuple(_incomplete(runs)),
        runs=runs,
        left_out=left_out or {},
    )


def read_runs(folder: Path, index: ComparisonIndex) -> list[MethodRun]:
    """Read the runs of a comparison; one that cannot be read comes with its problem instead of a history."""
    runs: list[MethodRun] = []
    for run in index.runs:
        path = folder / run.path
        try:
            runs.append(MethodRun(run.method, run.seed, history.read(path), run.path))
        except (ExperimentError, OSError, ValueError) as error:
            problem = (
                str(error)
                if RunLayout(path).experiment_file.exists()
                else "it has not begun: its folder has no experiment.yaml"
            )
            runs.append(MethodRun(run.method, run.seed, None, run.path, problem))
    return runs


def _require_one_of_each(runs: Sequence[MethodRun]) -> None:
    keys = [(run.method, run.seed) for run in runs]
    for method, seed in keys:
        if keys.count((method, seed)) > 1:
            raise ValueError(
                f"there is more than one run of method {method!r} with seed {seed}; give one for each method and seed"
            )


def _students(run: MethodRun) -> tuple[ParticipantHistory, ...]:
    """Return the students of a run without its teachers; none where the run cannot be read."""
    return () if run.history is None else run.history.students


def _student_names(runs: Sequence[MethodRun]) -> list[str]:
    return list(dict.fromkeys(student.name for run in runs for student in _students(run)))


def _incomplete(runs: Sequence[MethodRun]) -> Iterator[Incomplete]:
    for run in runs:
        if run.history is None:
            yield Incomplete(run.method, run.seed, run.path, run.problem)
            continue
        unfinished = [student for student in _students(run) if student.final is None]
        if unfinished:
            reasons = ", ".join(f"{student.name} {_last_test(student)}" for student in unfinished)
            last_epoch = run.history.experiment.training.epochs
            yield Incomplete(run.method, run.seed, run.path, f"{reasons}; the last epoch is {last_epoch}")


def _last_test(student: ParticipantHistory) -> str:
    return f"was last tested at epoch {student.test[-1].epochs_trained:g}" if student.test else "was never tested"


def _compare_student(name: str, runs: Sequence[MethodRun], methods: Sequence[str]) -> StudentComparison:
    histories = [(run, student) for run in runs for student in _students(run) if student.name == name]
    tests: dict[str, dict[int, tuple[Measured, ...]]] = {method: {} for method in methods}
    for run, student in histories:
        if student.final is not None:
            tests[run.method][run.seed] = student.test
    accuracies = {
        method: Spread({seed: measured[-1].accuracy for seed, measured in sorted(by_seed.items())})
        for method, by_seed in tests.items()
    }
    curves = {method: _curve(list(by_seed.items())) for method, by_seed in tests.items()}
    parameters = (student.parameters for _, student in histories if student.parameters is not None)
    return StudentComparison(name, histories[0][1].model, next(parameters, None), _results(accuracies, curves))


def _results(accuracies: Mapping[str, Spread], curves: Mapping[str, Curve]) -> dict[str, Result]:
    alone = accuracies.get(BASELINE)
    results: dict[str, Result] = {}
    for method, accuracy in accuracies.items():
        gain = None if alone is None or method == BASELINE else _paired_gain(accuracy, alone)
        results[method] = Result(accuracy, gain, curves[method])
    return results


def _paired_gain(accuracy: Spread, alone: Spread) -> Spread:
    return Spread({seed: value - alone.values[seed] for seed, value in accuracy.values.items() if seed in alone.values})


def _mean(spreads: Sequence[Spread]) -> Spread:
    """Return the mean over students, for the seeds that have a value of each."""
    seeds = _shared(spread.values for spread in spreads)
    return Spread({seed: statistics.fmean(spread.values[seed] for spread in spreads) for seed in seeds})


def _curve(tests: Sequence[tuple[int, Sequence[Measured]]]) -> Curve:
    """Return the curve of one student with one method, from the test measurements of each seed."""
    # Epochs are ratios of whole numbers, equal up to rounding in all runs.
    by_epoch = [
        (seed, {round(measured.epochs_trained, 6): measured.accuracy for measured in series}) for seed, series in tests
    ]
    epochs = _shared(accuracies for _, accuracies in by_epoch)
    spreads = (Spread({seed: accuracies[epoch] for seed, accuracies in by_epoch}) for epoch in epochs)
    return Curve(tuple(epochs), tuple(spreads))


def _mean_curve(curves: Sequence[Curve]) -> Curve:
    by_epoch = [dict(zip(curve.epochs, curve.accuracy, strict=True)) for curve in curves]
    epochs = _shared(by_epoch)
    return Curve(tuple(epochs), tuple(_mean([accuracies[epoch] for accuracies in by_epoch]) for epoch in epochs))


def _shared(mappings: Iterable[Mapping[_Key, Any]]) -> list[_Key]:
    """Return the keys that all mappings have, in order; none where there is no mapping."""
    keys = [set(mapping) for mapping in mappings]
    return sorted(set[_Key].intersection(*keys)) if keys else []
