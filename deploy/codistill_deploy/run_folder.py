"""The layout of a run's folder.

experiment.yaml         the resolved experiment
run.json                when, with which command, versions and machine the run was started
journal.sqlite          the closed rounds (the server's)
metrics.jsonl           what was measured, events.jsonl what happened (the server's; codistill.rundir.records)
supervisor.jsonl        which processes ended, and were started again (the command's)
run.lock                held by the command and every process that it started; server.lock by a server
start.lock              held by a server or a worker while it makes the folder a run's
server.json             the server's address, while it is up
driver.json             by which the nodes of a Ray cluster see that they share the folder; host.lock by the actor of a server or a student
server.log
students/NAME/          log.txt, checkpoint.safetensors and the one before it, best.safetensors
teachers/NAME/          log.txt
report.html
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import sqlite3
import sys
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from codistill import __version__
from codistill.config.experiment import Experiment, load
from codistill.config.fingerprint import difference, extends, identity
from codistill.process.exit_codes import ExitCode
from codistill_deploy.errors import CommandError

__all__ = ["RunFolder", "holding", "write_atomically"]

_POLL_SECONDS = 0.1
_JOURNAL = "journal.sqlite"
_RECORDS = ("metrics.jsonl", "events.jsonl", "supervisor.jsonl")
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

    @classmethod
    def lasting(cls, name: str) -> RunFolder:
        """Returns the folder below `runs` that a server or a worker finds again when it is started again by hand."""
        return cls(Path("runs") / name)

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

    def teacher_log(self, name: str) -> Path:
        """What a teacher's worker printed."""
        return self.path / "teachers" / name / "log.txt"

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
            lock = (self.path / "run.lock").open("w")
        except OSError as error:
            raise CommandError(
                f"run folder {self.path} cannot be written: {error.strerror}; make it writable, or give another --run-dir"
            ) from error
        with lock:
            if not _lock(lock.fileno(), seconds, waiting):
                raise CommandError(
                    f"run folder {self.path} is in use by another run, or by a process of one that was killed; end it "
                    "first, or give another --run-dir"
                )
            yield lock.fileno()

    def experiment(self) -> Experiment:
        """Returns the run's experiment.

        Raises:
            CommandError: the folder holds no run.
            ExperimentError: its experiment cannot be read.
        """
        if not self.experiment_file.exists():
            raise CommandError(f"{self.path} is not a run folder: it has no {self.experiment_file.name}")
        return load(self.experiment_file)

    @property
    def begun(self) -> bool:
        """Whether there is something to go on with: a checkpoint, a closed round, or a server at work."""
        return (
            any((self.path / "students").glob("*/*.safetensors")) or _holds_rounds(self.path / _JOURNAL) or self.served
        )

    @property
    def served(self) -> bool:
        """Whether a server is at work in the folder."""
        return _is_locked(self.path / "server.lock")

    @property
    def held(self) -> bool:
        """Whether a run, or a process of one, is at work in the folder."""
        return _is_locked(self.path / "run.lock")

    def check(self, experiment: Experiment, *, resume: bool) -> None:
        """Checks that an experiment may be run in the folder.

        A folder in which nothing was trained yet stops nobody: its experiment may be corrected and started again.

        Raises:
            CommandError: the folder holds another run, or holds this one and `resume` is not given, or `resume` is given
                and it holds none.
        """
        if not self.experiment_file.exists():
            if resume:
                raise CommandError(
                    f"run folder {self.path} holds no run to go on with; give the --run-dir of one, or leave out --resume "
                    "to start one there"
                )
        elif self.begun:
            if not resume:
                raise CommandError(
                    f"run folder {self.path} already holds a run; give --resume to go on with it, or another --run-dir"
                )
            self._check_same(experiment)

    def start(self, experiment: Experiment, *, mode: str, resume: bool) -> None:
        """Makes the folder ready for a run, or for going on with the run that it holds.

        Args:
            experiment: the experiment to run.
            mode: "grpc" or "in-process".
            resume: go on with the run in the folder.

        Raises:
            CommandError: as :meth:`check`, or the folder cannot be written.
        """
        self.check(experiment, resume=resume)
        with self._writing():
            if not self.begun:
                self._discard()
            self._write(experiment, mode, experiment.names)

    def join(self, experiment: Experiment, students: Iterable[str] = (), seconds: float = 15.0) -> None:
        """Makes the folder a run's for a server or a worker that is started by itself; others may do the same meanwhile.

        Where it is this run's already, nothing is changed but for students that were added to the experiment.

        Args:
            experiment: the experiment to run.
            students: those whose files will be in the folder.
            seconds: how long to wait for others that do the same.

        Raises:
            CommandError: the folder holds another run, cannot be written, or is kept by another process.
        """
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            with (self.path / "start.lock").open("a+") as lock:
                if not _lock(lock.fileno(), seconds):
                    lock.seek(0)
                    holder = lock.read().strip() or "unknown"
                    raise CommandError(
                        f"run folder {self.path} has been kept for {seconds:g} s by another server or worker, which holds "
                        f"{lock.name} (process {holder}); it is stopped, or its disk does not answer: end it, then start this "
                        "one again",
                        ExitCode.ERROR,
                    )
                with contextlib.suppress(
                    OSError
                ):  # who holds it is worth knowing, and no reason to fail on a full disk
                    os.ftruncate(lock.fileno(), 0)
                    os.write(lock.fileno(), f"{os.getpid()} on {platform.node()}".encode())
                if self.experiment_file.exists():
                    if identity(self.experiment()) == identity(experiment):
                        return
                    if self.begun:
                        self._check_same(experiment)
                    else:
                        self._discard()
                self._write(experiment, "grpc", students)

    def _check_same(self, experiment: Experiment) -> None:
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

    def _discard(self) -> None:
        """Removes what a run left that came to nothing."""
        for name in (*(f"{_JOURNAL}{suffix}" for suffix in ("", "-wal", "-shm")), *_RECORDS):
            (self.path / name).unlink(missing_ok=True)

    def _write(self, experiment: Experiment, mode: str, students: Iterable[str]) -> None:
        (self.path / "students").mkdir(parents=True, exist_ok=True)
        for name in students:
            self.student(name).mkdir(exist_ok=True)
        for name in experiment.teacher_names:
            self.teacher_log(name).parent.mkdir(parents=True, exist_ok=True)
        _sync_folder(self.path / "students")
        write_atomically(self.path / "run.json", json.dumps(_about(mode), indent=2) + "\n")
        # Last, as it makes the folder a run's.
        write_atomically(self.experiment_file, experiment.to_yaml())
        _sync_folder(self.path.parent)

    @contextlib.contextmanager
    def _writing(self) -> Generator[None, None, None]:
        try:
            yield
        except OSError as error:
            raise CommandError(
                f"run folder {self.path} cannot be written: {error.strerror}; make it writable, or give another --run-dir"
            ) from error


@contextlib.contextmanager
def holding(path: Path, seconds: float) -> Generator[int, None, None]:
    """Holds the lock on a file, which is made; gives its descriptor, for children that are to hold it too.

    Raises:
        TimeoutError: others held it for so many seconds.
        OSError: the file cannot be written.
    """
    with path.open("w") as lock:
        if not _lock(lock.fileno(), seconds):
            raise TimeoutError
        yield lock.fileno()


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


def _lock(descriptor: int, seconds: float, waiting: Callable[[], None] = lambda: None) -> bool:
    """Locks a file within so many seconds; returns whether it could. `waiting` is called once if it takes a while."""
    deadline = time.monotonic() + seconds
    told = False
    while not _locked(descriptor):
        if not told:
            told = True
            waiting()
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_locked(path: Path) -> bool:
    """Returns whether a process holds the lock on a file; there need be no such file."""
    try:
        with path.open() as file:
            return not _locked(file.fileno())
    except OSError:
        return False


def _holds_rounds(journal: Path) -> bool:
    """Returns whether a journal holds a closed round, or may: nothing is thrown away that cannot be read."""
    if not journal.exists():
        return False
    try:
        with contextlib.closing(sqlite3.connect(journal)) as database:
            tables = database.execute("SELECT count(*) FROM sqlite_master WHERE name = 'rounds'").fetchone()
            return tables != (0,) and database.execute("SELECT 1 FROM rounds LIMIT 1").fetchone() is not None
    except sqlite3.Error:
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
