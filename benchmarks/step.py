"""The time that the exchange adds to a training step.

Students train together through a server (KDCL's min_logit, in lockstep) and, on the same machine with as many
processes, each alone. In lockstep nobody can be faster than the slowest. So a student's step together is compared with
the slowest student's step alone. What their ratio has above 1 is the price of the exchange.

Both are real `codistill run`s on images made up in memory, a thread for each worker. They take turns. In each run
only the time counts in which all students train: after the first report of every one and before the last of any.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from codistill.config.data import Data
from codistill.rundir import records
from codistill.rundir.layout import RunLayout

_ROUNDS_PER_EPOCH = 50
_SIDE = 32
_Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Pace:
    """How fast a student trains in one run, in seconds.

    Attributes:
        step: median time of a training step, waiting included.
        wait: median time that a step waits for its targets.
    """

    step: float
    wait: float


@dataclass(frozen=True)
class Run:
    """Every student's pace in one run.

    Attributes:
        paces: by student.
        overlapped: whether the students trained at the same time for long enough to count that time only; if not, all
            of the run counts.
    """

    paces: Mapping[str, Pace]
    overlapped: bool


@dataclass(frozen=True)
class Repetition:
    """Two runs one after the other."""

    alone: Run
    together: Run

    def ratio(self, student: str) -> float:
        """Return a student's step together over the slowest student's step alone."""
        return self.together.paces[student].step / max(pace.step for pace in self.alone.paces.values())


class BenchmarkError(RuntimeError):
    """A run failed; the text says how."""


def images(data: Data) -> tuple[_Array, _Array, _Array, _Array]:
    """Return noise of 32×32 pixels in three channels with labels drawn at random: a data set of `codistill`."""
    generator = np.random.default_rng(0)

    def split(size: int | None) -> tuple[_Array, _Array]:
        assert size is not None  # noqa: S101 - the experiment gives both sizes
        pixels = generator.integers(256, size=(size, 3, _SIDE, _SIDE), dtype=np.uint8)
        return pixels, generator.integers(data.class_count, size=size)

    return (*split(data.train_size), *split(data.test_size))


def summarise(found: Iterable[records.Record]) -> Run:
    """Return every student's pace while all of them trained.

    Args:
        found: a run's records.
    """
    by_student: dict[str, list[records.Paced]] = {}
    for record in found:
        if isinstance(record, records.Paced):
            by_student.setdefault(record.participant, []).append(record)
    begin = max(reports[0].time for reports in by_student.values())
    end = min(reports[-1].time for reports in by_student.values())
    shared = {
        student: [report for report in reports if begin < report.time <= end] for student, reports in by_student.items()
    }
    overlapped = all(shared.values())
    paces = {
        student: Pace(
            statistics.median(report.step_seconds for report in reports),
            statistics.median(report.wait_seconds for report in reports),
        )
        for student, reports in (shared if overlapped else by_student).items()
    }
    return Run(paces, overlapped)


def _experiment(method: Mapping[str, str], models: Sequence[str], classes: int, batch_size: int, steps: int) -> str:
    epochs = math.ceil(steps / _ROUNDS_PER_EPOCH)
    document = {
        "name": "benchmark",
        "data": {
            "dataset": f"{Path(__file__).stem}:{images.__name__}",
            "classes": classes,
            "train_size": batch_size * min(steps, _ROUNDS_PER_EPOCH),
            "test_size": batch_size,
        },
        "training": {
            "epochs": epochs,
            "batch_size": batch_size,
            "optimizer": {"lr": 0.001},
            "schedule": {"name": "constant"},
            "device": "cpu",
            "threads": 1,
            "evaluate_every": epochs,
            "checkpoint_every": 3600,
        },
        "distillation": method,
        "students": [{"name": f"{position}-{model}", "model": model} for position, model in enumerate(models, 1)],
    }
    return json.dumps(document)  # which is YAML


def _run(experiment: str, limit: float) -> Run:
    """Run an experiment as a user would, and return the students' paces."""
    with tempfile.TemporaryDirectory(prefix="codistill-bench-") as name:
        folder = Path(name)
        (folder / "experiment.yaml").write_text(experiment, encoding="utf-8")
        paths = (str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", ""))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        command = [sys.executable, "-m", "codistill_deploy", "run", "experiment.yaml", "--run-dir", "run"]
        try:
            # Whatever ends the command, its server and workers end with it.
            ended = subprocess.run(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=limit,
                check=False,
                text=True,
            )
        except subprocess.TimeoutExpired:
            raise BenchmarkError(f"a run was not done after {limit:g} s; raise --limit or lower --steps") from None
        if ended.returncode:
            raise BenchmarkError(f"codistill run ended with exit code {ended.returncode}:\n{ended.stdout.strip()}")
        return summarise(records.read(RunLayout(folder / "run").metrics_file))


def _table(repetitions: Sequence[Repetition]) -> Table:
    table = Table(box=box.MARKDOWN)
    table.add_column("student")
    for title in ("step alone ms", "step together ms", "together/slowest alone", "wait ms"):
        table.add_column(title, justify="right")
    for student in sorted(repetitions[0].alone.paces):
        table.add_row(
            student,
            _milliseconds(repetition.alone.paces[student].step for repetition in repetitions),
            _milliseconds(repetition.together.paces[student].step for repetition in repetitions),
            f"{statistics.median(repetition.ratio(student) for repetition in repetitions):.3f}",
            _milliseconds(repetition.together.paces[student].wait for repetition in repetitions),
        )
    return table


def _milliseconds(seconds: Iterable[float]) -> str:
    return f"{1000 * statistics.median(seconds):.2f}"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    models: Annotated[str, typer.Option(help="The students' models, separated by commas.")] = "resnet20,wrn16_2",
    batch_size: Annotated[int, typer.Option(min=2, help="Images of a step.")] = 64,
    classes: Annotated[int, typer.Option(min=2, help="Classes of the images.")] = 100,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a run; above 50, rounded up to a multiple of it.")] = 50,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions; the median of them is shown.")] = 5,
    limit: Annotated[float, typer.Option(min=1, help="Seconds that one run may take.")] = 900.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every repetition to a file.")
    ] = None,
) -> None:
    """Compare a training step with codistill's exchange to one without it."""
    names = [part.strip() for part in models.split(",")]
    if len(names) < 2:
        raise typer.BadParameter("an exchange needs two students at least", param_hint="--models")
    alone = _experiment({"method": "independent"}, names, classes, batch_size, steps)
    together = _experiment({"method": "kdcl", "ensemble": "min_logit"}, names, classes, batch_size, steps)
    progress = Console(stderr=True, highlight=False)
    repetitions: list[Repetition] = []
    try:
        for repetition in range(repeats):
            progress.print(f"repetition {repetition + 1} of {repeats}")
            order = (alone, together) if repetition % 2 == 0 else (together, alone)
            measured = {experiment: _run(experiment, limit) for experiment in order}
            repetitions.append(Repetition(measured[alone], measured[together]))
    except BenchmarkError as error:
        progress.print(f"error: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    if not all(run.overlapped for pair in repetitions for run in (pair.alone, pair.together)):
        progress.print("the runs are too short to count only the time in which all students train; raise --steps")
    Console(width=200).print(_table(repetitions))
    if json_file is not None:
        written = {"repetitions": [asdict(pair) for pair in repetitions]}
        json_file.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
