"""Runs side by side: what each student gains by learning together.

The accuracy of a run is that of the test measurement after the last epoch, never that of the best one. A gain is
paired: a student's accuracy with a method less its own accuracy alone with the same seed. Every spread is the sample
standard deviation over seeds (n − 1), and there is none with one seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from codistill.config.experiment import ExperimentError
from codistill.rundir import history
from codistill.rundir.files import write_atomically
from codistill.rundir.history import History
from codistill.rundir.layout import ComparisonLayout, RunLayout
from codistill.rundir.records import Measured

__all__ = [
    "BASELINE",
    "Comparison",
    "ComparisonIndex",
    "Curve",
    "Incomplete",
    "IndexedRun",
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


class IndexedRun(BaseModel):
    """One run of a comparison and where it is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    seed: int
    path: str = Field(description="The run folder, relative to the comparison's, with `/` between its parts.")

    @field_validator("path")
    @classmethod
    def _inside(cls, value: str) -> str:
        path = PurePosixPath(value)
        if not path.parts or path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{value!r} does not lie inside the comparison folder; give a relative path without `..`")
        return value


class ComparisonIndex(BaseModel):
    """``comparison.json``: which runs belong to a comparison."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    experiment: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: tuple[IndexedRun, ...]
    left_out: Mapping[str, str] = Field(
        default_factory=dict[str, str], description="Methods that the experiment does not meet the needs of, and why."
    )

    @staticmethod
    def path(folder: Path) -> Path:
        """Returns where a comparison folder keeps its index."""
        return ComparisonLayout(folder).index_file

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads a comparison folder's index.

        Raises:
            OSError: there is none, or it cannot be read.
            ValueError: it is not of this form.
        """
        path = cls.path(folder)
        content = path.read_bytes()
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{path}: {where + ': ' if where else ''}{first['msg']}") from error

    def write(self, folder: Path) -> Path:
        """Writes the index into a comparison folder, which it makes if need be, and returns the file."""
        folder.mkdir(parents=True, exist_ok=True)
        path = self.path(folder)
        write_atomically(path, self.model_dump_json(indent=2) + "\n")
        return path


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
    """How one student, or the mean of all, does with one method."""

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
    """The table of a comparison, and all that its report shows."""

    methods: tuple[str, ...]
    """`independent` first, if it is there, then in the order of the runs."""
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
        """Whether the methods are too many to stand side by side: tables and pictures have them one below the other."""
        return len(self.others) > _SIDE_BY_SIDE


def summarise(runs: Iterable[MethodRun], left_out: Mapping[str, str] | None = None) -> Comparison:
    """Puts runs side by side.

    A student without a measurement after the last epoch has no value for that method and seed; its run is named in
    `incomplete`, and the other students of the run keep their values.

    Args:
        runs: the runs.
        left_out: methods that were not run, and why.

    Raises:
        ValueError: two runs are of the same method and seed.
    """
    runs = tuple(runs)
    keys = [(run.method, run.seed) for run in runs]
    for method, seed in keys:
        if keys.count((method, seed)) > 1:
            raise ValueError(
                f"there is more than one run of method {method!r} with seed {seed}; give one for each method and seed"
            )
    methods = tuple(sorted(dict.fromkeys(run.method for run in runs), key=lambda method: method != BASELINE))
    seeds = tuple(sorted({run.seed for run in runs}))
    described: dict[str, tuple[str, int | None]] = {}
    series: dict[str, dict[str, dict[int, tuple[Measured, ...]]]] = {}
    incomplete: list[Incomplete] = []
    for run in runs:
        if run.history is None:
            incomplete.append(Incomplete(run.method, run.seed, run.path, run.problem))
            continue
        unfinished: list[str] = []
        for student in (each for each in run.history.students if not each.teacher):
            model, parameters = described.get(student.name, (student.model, None))
            described[student.name] = (model, student.parameters if parameters is None else parameters)
            if student.final is None:
                reached = f"was last tested at epoch {student.test[-1].epoch:g}" if student.test else "was never tested"
                unfinished.append(f"{student.name} {reached}")
            else:
                series.setdefault(student.name, {}).setdefault(run.method, {})[run.seed] = student.test
        if unfinished:
            reason = f"{', '.join(unfinished)}; the last epoch is {run.history.experiment.training.epochs}"
            incomplete.append(Incomplete(run.method, run.seed, run.path, reason))

    students: list[StudentComparison] = []
    for name, (model, parameters) in described.items():
        accuracies = {
            method: Spread(
                {seed: tests[-1].accuracy for seed, tests in sorted(series.get(name, {}).get(method, {}).items())}
            )
            for method in methods
        }
        curves = {method: _curve(list(series.get(name, {}).get(method, {}).items())) for method in methods}
        students.append(StudentComparison(name, model, parameters, _results(accuracies, curves)))

    means = {method: _mean([student.results[method].accuracy for student in students]) for method in methods}
    mean_curves = {method: _mean_curve([student.results[method].curve for student in students]) for method in methods}
    return Comparison(
        methods=methods,
        seeds=seeds,
        students=tuple(students),
        means=_results(means, mean_curves),
        incomplete=tuple(incomplete),
        runs=runs,
        left_out=left_out or {},
    )


def read_runs(folder: Path, index: ComparisonIndex) -> list[MethodRun]:
    """Reads the runs of a comparison; one that cannot be read comes with its problem instead of a history."""
    runs: list[MethodRun] = []
    for each in index.runs:
        path = folder / each.path
        try:
            runs.append(MethodRun(each.method, each.seed, history.read(path), each.path))
        except (ExperimentError, OSError, ValueError) as error:
            problem = (
                str(error)
                if RunLayout(path).experiment_file.exists()
                else "it has not begun: its folder has no experiment.yaml"
            )
            runs.append(MethodRun(each.method, each.seed, None, each.path, problem))
    return runs


def _results(accuracies: Mapping[str, Spread], curves: Mapping[str, Curve]) -> dict[str, Result]:
    alone = accuracies.get(BASELINE)
    return {
        method: Result(
            accuracy, None if alone is None or method == BASELINE else _paired(accuracy, alone), curves[method]
        )
        for method, accuracy in accuracies.items()
    }


def _paired(accuracy: Spread, alone: Spread) -> Spread:
    return Spread({seed: value - alone.values[seed] for seed, value in accuracy.values.items() if seed in alone.values})


def _mean(spreads: Sequence[Spread]) -> Spread:
    seeds = set[int].intersection(*(set(each.values) for each in spreads)) if spreads else set[int]()
    return Spread({seed: statistics.fmean(each.values[seed] for each in spreads) for seed in sorted(seeds)})


def _curve(tests: Sequence[tuple[int, Sequence[Measured]]]) -> Curve:
    # Epochs are ratios of whole numbers, equal up to rounding in all runs.
    by_epoch = [(seed, {round(each.epoch, 6): each.accuracy for each in series}) for seed, series in tests]
    shared = set[float].intersection(*(set(each) for _, each in by_epoch)) if by_epoch else set[float]()
    epochs = sorted(shared)
    return Curve(tuple(epochs), tuple(Spread({seed: each[epoch] for seed, each in by_epoch}) for epoch in epochs))


def _mean_curve(curves: Sequence[Curve]) -> Curve:
    by_epoch = [dict(zip(curve.epochs, curve.accuracy, strict=True)) for curve in curves]
    shared = set[float].intersection(*(set(each) for each in by_epoch)) if by_epoch else set[float]()
    epochs = sorted(shared)
    return Curve(tuple(epochs), tuple(_mean([each[epoch] for each in by_epoch]) for epoch in epochs))
