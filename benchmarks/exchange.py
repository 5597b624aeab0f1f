"""Round trips of an exchange: codistill's service, gloo's all_gather and Ray actors, side by side.

A round trip is what a training step waits for. It begins with a worker's logits [B, C], a float32 tensor. It ends with
the target that all N workers' logits make (KDCL's min_logit), as a tensor in that worker. There are three contenders:

* codistill: a server process and N worker processes that speak gRPC, journal included.
* gloo: N processes in one torch.distributed group: all_gather, then each computes the target itself.
* ray: N worker actors that call an asyncio actor, which gathers, computes the target and returns it.

They take turns in every repetition of every configuration, so that other load on the machine slows all of them alike. Every process has one torch thread, every wait a limit, and no process is left behind.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import math
import os
import platform
import statistics
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from round_trips.processes import TaskProcesses
from round_trips.ray_actors import RayActors
from round_trips.tasks import GlooTask, ServerTask, WorkerTask, experiment_file
from round_trips.workload import BenchmarkError, Configuration, Workload

_CONTENDERS = ("codistill", "gloo", "ray")


@dataclass(frozen=True)
class Measurement:
    """One repetition of one contender in one configuration.

    Attributes:
        rate: rounds per second; in a round every worker makes one round trip.
        p50: median over all workers' round trips, in milliseconds.
        p99: their 99th percentile, in milliseconds.
    """

    contender: str
    configuration: Configuration
    repetition: int
    rate: float
    p50: float
    p99: float


class _Contest:
    def __init__(self, rounds: int, limit: float, processes: TaskProcesses | None, ray: RayActors | None) -> None:
        self._rounds = rounds
        self._limit = limit
        self._processes = processes
        self._ray = ray

    def measure(self, contender: str, configuration: Configuration, repetition: int) -> Measurement:
        """Measure one contender once."""
        workloads = [
            Workload(configuration, position, self._rounds, self._limit) for position in range(configuration.workers)
        ]
        with tempfile.TemporaryDirectory(prefix="codistill-bench-") as name:
            seconds = self._run(contender, configuration, workloads, Path(name))
        p50, p99 = np.percentile(np.array(seconds), (50, 99))
        rate = self._rounds / max(sum(round_trips) for round_trips in seconds)
        return Measurement(contender, configuration, repetition, rate, 1000 * float(p50), 1000 * float(p99))

    def _run(
        self, contender: str, configuration: Configuration, workloads: Sequence[Workload], folder: Path
    ) -> list[list[float]]:
        if contender == "ray":
            assert self._ray is not None  # noqa: S101 - started where it is a contender
            return self._ray.run(workloads, self._limit)
        assert self._processes is not None  # noqa: S101 - as above
        if contender == "gloo":
            return self._processes.run([GlooTask(folder, workload) for workload in workloads], self._limit)
        experiment = experiment_file(configuration)
        server = ServerTask(experiment, folder, self._limit)
        workers = [WorkerTask(experiment, folder, workload) for workload in workloads]
        return self._processes.run([server, *workers], self._limit)[1:]


@contextlib.contextmanager
def _started(contenders: Sequence[str], workers: int, rounds: int, limit: float) -> Generator[_Contest]:
    """Start what the contenders need, and end it."""
    with contextlib.ExitStack() as stack:
        processes = ray = None
        if {"codistill", "gloo"} & set(contenders):
            processes = TaskProcesses(workers + ("codistill" in contenders))
            stack.callback(processes.close)
        if "ray" in contenders:
            # Sockets lie in this folder and their paths must be short, so it is not put below TMPDIR.
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="ray-bench-", dir="/tmp", ignore_cleanup_errors=True)
            )
            ray = RayActors(workers, Path(folder))
            stack.callback(ray.close)
        yield _Contest(rounds, limit, processes, ray)


def _table(measurements: Sequence[Measurement], contenders: Sequence[str]) -> Table:
    table = Table(box=box.MARKDOWN)
    table.add_column("logits")
    table.add_column("workers", justify="right")
    for contender in contenders:
        for what in ("rounds/s", "p50 ms", "p99 ms"):
            table.add_column(f"{contender} {what}", justify="right")
    others = [contender for contender in contenders if contender != "codistill"] if "codistill" in contenders else []
    for other in others:
        table.add_column(f"{other}/codistill", justify="right")
    for configuration in dict.fromkeys(measurement.configuration for measurement in measurements):
        mine = {
            contender: [
                measurement
                for measurement in measurements
                if (measurement.configuration, measurement.contender) == (configuration, contender)
            ]
            for contender in contenders
        }
        cells: list[str] = []
        for repetitions in mine.values():
            cells += [
                f"{statistics.median(measurement.rate for measurement in repetitions):,.0f}",
                _milliseconds(statistics.median(measurement.p50 for measurement in repetitions)),
                _milliseconds(statistics.median(measurement.p99 for measurement in repetitions)),
            ]
        for other in others:
            pairs = zip(mine[other], mine["codistill"], strict=True)
            cells.append(f"{statistics.median(theirs.p50 / ours.p50 for theirs, ours in pairs):.2f}")
        table.add_row(f"{configuration.batch}x{configuration.classes}", str(configuration.workers), *cells)
    return table


def _milliseconds(value: float) -> str:
    """Return three significant digits."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _machine() -> dict[str, Any]:
    versions: dict[str, str] = {}
    for package in ("torch", "grpcio", "protobuf", "numpy", "ray"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
    }


# The command


def _shapes(text: str) -> list[tuple[int, int]]:
    shapes: list[tuple[int, int]] = []
    for part in text.split(","):
        batch, _, classes = part.strip().partition("x")
        if not (batch.isdecimal() and classes.isdecimal() and int(batch) >= 1 and int(classes) >= 2):
            raise typer.BadParameter(f"{part!r} is not BATCHxCLASSES, as in 128x100", param_hint="--shapes")
        shapes.append((int(batch), int(classes)))
    return shapes


def _workers(text: str) -> list[int]:
    counts: list[int] = []
    for part in text.split(","):
        if not (part.strip().isdecimal() and 2 <= int(part) <= 256):
            raise typer.BadParameter(f"{part!r} is not a number of workers from 2 to 256", param_hint="--workers")
        counts.append(int(part))
    return counts


def _contenders(text: str) -> list[str]:
    chosen = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in chosen:
        if name not in _CONTENDERS:
            allowed = ", ".join(_CONTENDERS)
            raise typer.BadParameter(f"{name!r} is not a contender; allowed: {allowed}", param_hint="--contenders")
    return chosen


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    shapes: Annotated[str, typer.Option(help="BATCHxCLASSES of the logits, separated by commas.")] = (
        "64x10,128x100,256x1000"
    ),
    workers: Annotated[str, typer.Option(help="Numbers of workers, separated by commas.")] = "2,4,8",
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions; the median of them is shown.")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of a repetition.")] = 100,
    contenders: Annotated[str, typer.Option(help="Whom to measure, separated by commas.")] = ",".join(_CONTENDERS),
    limit: Annotated[float, typer.Option(min=1, help="Seconds that one measurement may take.")] = 120.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every repetition to a file.")
    ] = None,
) -> None:
    """Compare the round trips of codistill's exchange with gloo's all_gather and Ray actors."""
    configurations = [
        Configuration(batch, classes, count) for batch, classes in _shapes(shapes) for count in _workers(workers)
    ]
    chosen = _contenders(contenders)
    progress = Console(stderr=True, highlight=False)
    found = importlib.util.find_spec("ray")
    if "ray" in chosen and (found is None or found.origin is None):  # without an origin it is the folder deploy/ray
        progress.print("ray is left out: it is not installed; pip install 'codistill[ray]'", markup=False)
        chosen.remove("ray")
    if not chosen:
        raise typer.BadParameter("nobody is left to measure", param_hint="--contenders")
    measurements: list[Measurement] = []
    most = max(configuration.workers for configuration in configurations)
    try:
        with _started(chosen, most, rounds, limit) as contest:
            for repetition in range(repeats):
                progress.print(f"repetition {repetition + 1} of {repeats}")
                turn = repetition % len(chosen)
                for configuration, contender in itertools.product(configurations, chosen[turn:] + chosen[:turn]):
                    measurements.append(contest.measure(contender, configuration, repetition))
    except BenchmarkError as error:
        progress.print(f"error: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    Console(width=200).print(_table(measurements, chosen))
    if json_file is not None:
        written = {"machine": _machine(), "measurements": [asdict(measurement) for measurement in measurements]}
        json_file.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
