"""Round trips of an exchange: codistill's service, gloo's all_gather and Ray actors, side by side.

A round trip is what a training step waits for: it begins with a worker's logits [B, C] as a float32 tensor and ends
with the target that all N workers' logits make (KDCL's min_logit) as a tensor in that worker. Three ways to get it:

codistill   a server process and N worker processes that speak gRPC, journal included;
gloo        N processes in one torch.distributed group: all_gather, then each computes the target itself;
ray         N worker actors that call an asyncio actor, which gathers, computes the target and returns it.

The contenders take turns in every repetition of every configuration, so that a machine's changing mood touches all of
them alike. Every process has one torch thread, every wait a limit, and no process outlives the program.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import platform
import secrets
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from codistill import PROTOCOL_VERSION
from codistill.experiment import parse
from codistill.identity import identity
from codistill.tensors import decode, encode
from codistill.v1 import distillation_pb2 as pb
from codistill_deploy.discovery import find_server
from codistill_server.app import ServeOptions, serve
from codistill_server.ensembles import min_logit
from codistill_worker.client import GrpcExchange

_CONTENDERS = ("codistill", "gloo", "ray")
_WARMUP = 10
_Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Configuration:
    """What is exchanged, among how many."""

    batch: int
    classes: int
    workers: int


@dataclass(frozen=True)
class Course:
    """One worker's part of a measurement.

    Attributes:
        configuration: what is exchanged.
        position: the worker's, from 0.
        rounds: how many are timed, after a few that are not.
        limit: seconds that any wait may take.
    """

    configuration: Configuration
    position: int
    rounds: int
    limit: float

    @property
    def total_rounds(self) -> int:
        """All rounds, those to warm up included."""
        return _WARMUP + self.rounds

    # Arrays, not tensors: Ray pickles these functions by value, and could not if they named torch beside `classes`.

    def logits(self) -> _Array:
        """Returns what this worker publishes, float32 [B, C]."""
        size = (self.configuration.batch, self.configuration.classes)
        return np.random.default_rng(self.position).standard_normal(size, np.float32)

    def labels(self) -> _Array:
        """Returns the labels, the same for all workers, int64 [B]."""
        return np.random.default_rng(0).integers(self.configuration.classes, size=self.configuration.batch)

    def time(self, round_trip: Callable[[int], torch.Tensor]) -> list[float]:
        """Makes all round trips, each given its round, and returns how many seconds each timed one took."""
        for number in range(_WARMUP):
            round_trip(number)
        seconds: list[float] = []
        before = time.perf_counter()
        for number in range(_WARMUP, self.total_rounds):
            round_trip(number)
            now = time.perf_counter()
            seconds.append(now - before)
            before = now
        return seconds


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


class BenchmarkError(RuntimeError):
    """A measurement failed; the text says where."""


# What the processes do


class _Task(Protocol):
    def run(self) -> list[float]: ...


@dataclass(frozen=True)
class _Serve:
    """The aggregation server, until its workers have finished."""

    experiment: str
    folder: Path
    limit: float

    def run(self) -> list[float]:
        stop = threading.Event()
        timer = threading.Timer(self.limit, stop.set)
        timer.start()
        try:
            serve(parse(self.experiment), ServeOptions("127.0.0.1:0", self.folder), stop)
        finally:
            timer.cancel()
            stop.set()
        return []


@dataclass(frozen=True)
class _Work:
    """A worker of codistill without a model."""

    experiment: str
    folder: Path
    course: Course

    def run(self) -> list[float]:
        course, stop = self.course, threading.Event()
        batch, classes = course.configuration.batch, course.configuration.classes
        logits, labels = torch.from_numpy(course.logits()), torch.from_numpy(course.labels())
        ids = torch.arange(batch)
        exchange = GrpcExchange(
            find_server(self.folder, course.limit, stop),
            connect_timeout=course.limit,
            give_up_after=course.limit,
            stop=stop,
        )

        def round_trip(number: int) -> torch.Tensor:
            outputs = {"logits": encode(logits, "float32")}
            samples = pb.Samples(ids=encode(ids, "int64"), labels=encode(labels, "int64"), outputs=outputs)
            exchange.send(pb.Contribution(round=number, batch=samples))
            return decode(exchange.receive(number).targets["logits"])

        try:
            exchange.join(
                pb.JoinRequest(
                    protocol_version=PROTOCOL_VERSION,
                    student=_student(course.position),
                    experiment=identity(parse(self.experiment)),
                    data=pb.DataFingerprint(
                        digest=64 * "0", train_samples=batch * course.total_rounds, classes=classes
                    ),
                    outputs={"logits": pb.Shape(dims=[classes])},
                    total_rounds=course.total_rounds,
                )
            )
            seconds = course.time(round_trip)
            exchange.leave(pb.LEAVE_REASON_FINISHED, "measured")
        finally:
            exchange.close()
        return seconds


@dataclass(frozen=True)
class _Gather:
    """A process of a gloo group."""

    folder: Path
    course: Course

    def run(self) -> list[float]:
        course = self.course
        logits, labels = torch.from_numpy(course.logits()), torch.from_numpy(course.labels())
        workers = course.configuration.workers
        everyone = torch.empty(workers, *logits.shape)
        parts = list(everyone.unbind())

        def round_trip(number: int) -> torch.Tensor:
            del number
            dist.all_gather(parts, logits)
            return min_logit(everyone, labels)

        dist.init_process_group(
            "gloo",
            init_method=f"file://{self.folder / 'store'}",
            rank=course.position,
            world_size=workers,
            timeout=timedelta(seconds=course.limit),
        )
        try:
            seconds = course.time(round_trip)
            dist.barrier()
        finally:
            dist.destroy_process_group()
        return seconds


def _student(position: int) -> str:
    return f"student{position}"


def _experiment(configuration: Configuration) -> str:
    """Returns an experiment file; its data set and models are never loaded."""
    document = {
        "name": "benchmark",
        "data": {"dataset": "image_folder", "classes": configuration.classes, "image_size": 32},
        "training": {"epochs": 1, "batch_size": configuration.batch},
        "distillation": {"method": "kdcl", "ensemble": "min_logit"},
        "students": [{"name": _student(position), "model": "mlp"} for position in range(configuration.workers)],
    }
    return json.dumps(document)  # which is YAML


# The processes


class _Members:
    """Processes that stay up and do tasks, so that a repetition does not pay for starting Python."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection[Any, Any]] = []
        self._processes: list[BaseProcess] = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_member, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, tasks: Sequence[_Task], limit: float) -> list[list[float]]:
        """Does tasks at the same time, one in each process, and returns their results.

        Raises:
            BenchmarkError: a task failed, or took longer than `limit` seconds.
        """
        results: list[list[float]] = [[]] * len(tasks)
        at_work = {pipe: position for position, pipe in enumerate(self._pipes[: len(tasks)])}
        for pipe, position in at_work.items():
            pipe.send(tasks[position])
        deadline = time.monotonic() + limit
        while at_work:
            ready = multiprocessing.connection.wait(at_work, max(0.0, deadline - time.monotonic()))
            if not ready:
                late = ", ".join(sorted(type(tasks[position]).__name__ for position in at_work.values()))
                raise BenchmarkError(f"not done after {limit:g} s: {late}; raise --limit or lower --rounds")
            for pipe in [each for each in at_work if each in ready]:
                position = at_work.pop(pipe)
                task = type(tasks[position]).__name__
                try:
                    answer = pipe.recv()
                except EOFError:
                    raise BenchmarkError(f"the process of {task} died") from None
                if isinstance(answer, str):
                    raise BenchmarkError(f"{task} failed: {answer}")
                results[position] = answer
        return results

    def close(self) -> None:
        """Ends the processes, whatever they are at."""
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.kill()
            process.join()
            pipe.close()


def _member(pipe: Connection[Any, Any]) -> None:
    os.setsid()  # the terminal's Ctrl-C is for the parent, which ends this process
    threading.Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(1)
    while True:
        try:
            task: _Task = pipe.recv()
        except EOFError:  # the parent is gone
            return
        try:
            answer: list[float] | str = task.run()
        except Exception as error:  # noqa: BLE001 - whatever it is, the parent says it and ends
            answer = f"{type(error).__name__}: {error}"
        pipe.send(answer)


def _follow_parent() -> None:
    """Ends this process when its parent has ended, however that came about."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # noqa: S101 - runs in a child only
    parent.join()
    os._exit(1)


# Ray


class _RayAggregator:
    """An actor that gathers a round's logits and returns the target to every worker of it."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._workers = 0
        self._gathered: dict[int, _Array] = {}
        self._target: asyncio.Future[_Array] | None = None

    async def begin(self, workers: int) -> None:
        self._workers = workers
        self._gathered, self._target = {}, None

    async def contribute(self, position: int, logits: _Array, labels: _Array) -> _Array:
        target = self._target
        if target is None:
            target = self._target = asyncio.get_running_loop().create_future()
        self._gathered[position] = logits
        if len(self._gathered) == self._workers:
            everyone = np.stack([self._gathered[each] for each in range(self._workers)])
            self._gathered, self._target = {}, None
            target.set_result(min_logit(torch.from_numpy(everyone), torch.tensor(labels)).numpy())
        return await target


class _RayWorker:
    def __init__(self) -> None:
        torch.set_num_threads(1)

    def run(self, aggregator: Any, course: Course) -> list[float]:
        ray: Any = importlib.import_module("ray")
        logits, labels = course.logits(), course.labels()

        def round_trip(number: int) -> torch.Tensor:
            del number
            asked = aggregator.contribute.remote(course.position, logits, labels)
            return torch.tensor(ray.get(asked, timeout=course.limit))

        return course.time(round_trip)


class _Ray:
    """A Ray of our own with its actors."""

    def __init__(self, workers: int, folder: Path) -> None:
        # Ray reads these when it is imported. A token of our own keeps others out and writes no file.
        os.environ.update(
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN=secrets.token_hex(32),
            RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
            RAY_USAGE_STATS_ENABLED="0",
            RAY_worker_niceness="0",  # else its workers run at 15, and lose to everybody
        )
        self._ray: Any = importlib.import_module("ray")
        self._ray.init(
            address="local",
            num_cpus=workers + 1,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            _temp_dir=str(folder),
        )
        actor = self._ray.remote(num_cpus=1)
        self._aggregator = actor(_RayAggregator).remote()
        self._workers = [actor(_RayWorker).remote() for _ in range(workers)]

    def run(self, courses: Sequence[Course], limit: float) -> list[list[float]]:
        """Runs the workers' courses at the same time and returns what each measured.

        Raises:
            BenchmarkError: it failed, or took longer than `limit` seconds.
        """
        try:
            self._ray.get(self._aggregator.begin.remote(len(courses)), timeout=limit)
            running = [
                worker.run.remote(self._aggregator, course)
                for worker, course in zip(self._workers, courses, strict=False)
            ]
            return self._ray.get(running, timeout=limit)
        except self._ray.exceptions.RayError as error:
            raise BenchmarkError(f"Ray: {type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Ends it, and no other Ray on this machine."""
        self._ray.shutdown()


# The measurement


class _Contest:
    def __init__(self, rounds: int, limit: float, members: _Members | None, ray: _Ray | None) -> None:
        self._rounds = rounds
        self._limit = limit
        self._members = members
        self._ray = ray

    def measure(self, contender: str, configuration: Configuration, repetition: int) -> Measurement:
        """Measures one contender once."""
        courses = [
            Course(configuration, position, self._rounds, self._limit) for position in range(configuration.workers)
        ]
        with tempfile.TemporaryDirectory(prefix="codistill-bench-") as name:
            seconds = self._run(contender, configuration, courses, Path(name))
        p50, p99 = np.percentile(np.array(seconds), (50, 99))
        rate = self._rounds / max(sum(each) for each in seconds)
        return Measurement(contender, configuration, repetition, rate, 1000 * float(p50), 1000 * float(p99))

    def _run(
        self, contender: str, configuration: Configuration, courses: Sequence[Course], folder: Path
    ) -> list[list[float]]:
        if contender == "ray":
            assert self._ray is not None  # noqa: S101 - started where it is a contender
            return self._ray.run(courses, self._limit)
        assert self._members is not None  # noqa: S101 - as above
        if contender == "gloo":
            return self._members.run([_Gather(folder, course) for course in courses], self._limit)
        experiment = _experiment(configuration)
        server = _Serve(experiment, folder, self._limit)
        workers = [_Work(experiment, folder, course) for course in courses]
        return self._members.run([server, *workers], self._limit)[1:]


@contextlib.contextmanager
def _started(contenders: Sequence[str], workers: int, rounds: int, limit: float) -> Generator[_Contest]:
    """Starts what the contenders need, and ends it."""
    with contextlib.ExitStack() as stack:
        members = ray = None
        if {"codistill", "gloo"} & set(contenders):
            members = _Members(workers + ("codistill" in contenders))
            stack.callback(members.close)
        if "ray" in contenders:
            # Sockets lie in this folder and their paths must be short, so it is not put below TMPDIR.
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="ray-bench-", dir="/tmp", ignore_cleanup_errors=True)
            )
            ray = _Ray(workers, Path(folder))
            stack.callback(ray.close)
        yield _Contest(rounds, limit, members, ray)


def _table(measurements: Sequence[Measurement], contenders: Sequence[str]) -> Table:
    table = Table(box=box.MARKDOWN)
    table.add_column("logits")
    table.add_column("workers", justify="right")
    for contender in contenders:
        for what in ("rounds/s", "p50 ms", "p99 ms"):
            table.add_column(f"{contender} {what}", justify="right")
    others = [each for each in contenders if each != "codistill"] if "codistill" in contenders else []
    for other in others:
        table.add_column(f"{other}/codistill", justify="right")
    for configuration in dict.fromkeys(each.configuration for each in measurements):
        mine = {
            contender: [
                each for each in measurements if (each.configuration, each.contender) == (configuration, contender)
            ]
            for contender in contenders
        }
        cells: list[str] = []
        for repetitions in mine.values():
            cells += [
                f"{statistics.median(each.rate for each in repetitions):,.0f}",
                _milliseconds(statistics.median(each.p50 for each in repetitions)),
                _milliseconds(statistics.median(each.p99 for each in repetitions)),
            ]
        for other in others:
            pairs = zip(mine[other], mine["codistill"], strict=True)
            cells.append(f"{statistics.median(theirs.p50 / ours.p50 for theirs, ours in pairs):.2f}")
        table.add_row(f"{configuration.batch}x{configuration.classes}", str(configuration.workers), *cells)
    return table


def _milliseconds(value: float) -> str:
    """Returns three significant digits."""
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
        written = {"machine": _machine(), "measurements": [asdict(each) for each in measurements]}
        json_file.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
