"""The layout of a run's folder.

experiment.yaml         the resolved experiment
run.json                when, with which command, versions and machine the run was started
journal.sqlite          the closed rounds (the server's)
metrics.jsonl           what was measured, events.jsonl what happened (the server's; codistill.records)
supervisor.jsonl        which processes ended, and were started again (the command's)
run.lock                held by the command and every process that it started; server.lock by a server
server.json             the server's address, while it is up
server.log
students/NAME/          log.txt, checkpoint.safetensors and the one before it, best.safetensors
report.html
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from codistill import __version__
from codistill.experiment import Experiment, difference, extends, identity, load
from codistill_deploy.errors import CommandError

__all__ = ["RunFolder", "write_atomically"]

_POLL_SECONDS = 0.1
_PACKAGES = ("torch", "grpcio", "protobuf", "numpy")


@dataclass(frozen=True)
class RunFolder:
    """A run's folder and where its files are."""

    path: Path

    @classmethod
    def default(cls, name: str) -> RunFolder:
        """Returns a new folder below `runs`, named after the run and the time."""
        stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
        return cls(Path("runs") / f"{name}-{stamp}")

    @property
    def experiment_file(self) -> Path:
        """The resolved experiment."""
        return self.path / "experiment.yaml"

    @property
    def server_log(self) -> Path:
        """What the server printed."""
        return self.path / "server.log"

    @property
    def metrics_file(self) -> Path:
        """What was measured; there once the run has begun."""
        return self.path / "metrics.jsonl"

    @property
    def report(self) -> Path:
        """The report."""
        return self.path / "report.html"

    def student(self, name: str) -> Path:
        """The folder of one student."""
        return self.path / "students" / name

    def student_log(self, name: str) -> Path:
        """What a student's worker printed."""
        return self.student(name) / "log.txt"

    @contextlib.contextmanager
    def hold(self, seconds: float = 15.0, waiting: Callable[[], None] = lambda: None) -> Generator[int, None, None]:
        """Keeps every other run out of the folder; gives the lock's descriptor.

        A child that inherits the descriptor holds the lock too. So where the command was killed, the next one waits until
        its last process has ended: two workers of one student would overwrite each other's checkpoints.

        Args:
            seconds: how long to wait for processes that are still ending.
            waiting: called once if there are some.

        Raises:
            CommandError: the folder cannot be written, or a run still uses it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / "run.lock").open("w")
        except OSError as error:
            raise CommandError(f"run folder {self.path} cannot be written: {error.strerror}") from error
        with file:
            deadline = time.monotonic() + seconds
            told = False
            while not _locked(file.fileno()):
                if not told:
                    told = True
                    waiting()
                if time.monotonic() >= deadline:
                    raise CommandError(
                        f"run folder {self.path} is in use by another run, or by a process of one that was killed; end it "
                        "first, or give another --run-dir"
                    )
                time.sleep(_POLL_SECONDS)
            yield file.fileno()

    def experiment(self) -> Experiment:
        """Returns the run's experiment.

        Raises:
            CommandError: the folder holds no run.
            ExperimentError: its experiment cannot be read.
        """
        if not self.experiment_file.exists():
            raise CommandError(f"{self.path} is not a run folder: it has no {self.experiment_file.name}")
        return load(self.experiment_file)

    def check(self, experiment: Experiment, *, resume: bool) -> None:
        """Checks that an experiment may be run in the folder.

        Raises:
            CommandError: the folder holds another run, or holds this one and `resume` is not given.
        """
        if self.experiment_file.exists():
            if not resume:
                raise CommandError(
                    f"run folder {self.path} already holds a run; give --resume to go on with it, or another --run-dir"
                )
            had, has = identity(self.experiment()), identity(experiment)
            differs = difference(had, has)
            if differs is not None and extends(had, has):
                if experiment.exchange.journal.keep != "all":
                    raise CommandError(
                        f"run folder {self.path}: students were added to its experiment, which needs a journal of every "
                        "round; set exchange.journal.keep: all from the run's start, or give another --run-dir"
                    )
            elif differs is not None:
                raise CommandError(
                    f"run folder {self.path} belongs to another experiment: "
                    f"{differs.replace('this worker', 'this experiment')}; give another --run-dir"
                )

    def start(self, experiment: Experiment, *, mode: str, resume: bool) -> None:
        """Makes the folder ready for a run, or for going on with the run that it holds.

        Args:
            experiment: the experiment to run.
            mode: "grpc" or "in-process".
            resume: go on with the run in the folder, if there is one.

        Raises:
            CommandError: the folder holds another run, or holds this one and `resume` is not given.
        """
        self.check(experiment, resume=resume)
        try:
            for name in experiment.names:
                self.student(name).mkdir(parents=True, exist_ok=True)
            _sync_folder(self.path / "students")
            write_atomically(self.path / "run.json", json.dumps(_about(mode), indent=2) + "\n")
            # Last, as it makes the folder a run's.
            write_atomically(self.experiment_file, experiment.to_yaml())
            _sync_folder(self.path.parent)
        except OSError as error:
            raise CommandError(f"run folder {self.path} cannot be written: {error.strerror}") from error


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is either wholly there or not at all, whatever dies meanwhile.

    Raises:
        OSError: it could not be written; what was there is still there.
    """
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _about(mode: str) -> dict[str, object]:
    versions = {"codistill": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "mode": mode,
        "command": ["codistill", *sys.argv[1:]],
        "versions": versions,
        "machine": {"system": platform.platform(), "cpus": os.cpu_count() or 0},
    }
