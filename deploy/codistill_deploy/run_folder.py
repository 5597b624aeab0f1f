"""A run's folder as the commands use it: which run it belongs to, and which processes use it now."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from codistill.config.experiment import Experiment, load
from codistill.config.fingerprint import difference, extends, identity
from codistill.process.exit_codes import ExitCode
from codistill.rundir.files import is_locked, locked, make_private_folder, sync_folder, write_atomically
from codistill.rundir.info import Mode, Start, add_start, differences, warn_of, write_info
from codistill.rundir.layout import RunLayout
from codistill.rundir.storage import unwritable
from codistill_deploy.errors import CommandError

__all__ = ["RunFolder"]

_log = logging.getLogger("codistill")


@dataclass(frozen=True)
class RunFolder(RunLayout):
    """The folder of one run, and the checks and locks under which commands use it.

    Its path is made absolute, as a user's code may change the working folder.
    """

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", self.path.absolute())

    @classmethod
    def default(cls, name: str) -> RunFolder:
        """Return a new folder below `runs`, named after the run and the time."""
        stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
        return cls(Path("runs") / f"{name}-{stamp}")

    @classmethod
    def lasting(cls, name: str) -> RunFolder:
        """Return the folder below `runs` that a server or a worker finds again when it is restarted by hand."""
        return cls(Path("runs") / name)

    @contextlib.contextmanager
    def hold(self, seconds: float = 15.0, waiting: Callable[[], None] = lambda: None) -> Generator[int, None, None]:
        """Keep every other run out of the folder, and yield the lock's descriptor.

        A child that inherits the descriptor holds the lock too. So if a command was killed, the next one waits until
        its last process has ended. Otherwise two workers of one student would overwrite each other's checkpoints.

        Args:
            seconds: how long to wait for processes that are still ending.
            waiting: called once if there are some.

        Raises:
            CommandError: the folder cannot be written, or a run still uses it.
        """
        with contextlib.ExitStack() as stack:
            with self._write_errors():
                make_private_folder(self.path)
                try:
                    lock = stack.enter_context(locked(self.run_lock, seconds, waiting))
                except TimeoutError as error:
                    raise CommandError(
                        f"run folder {self.path} is in use by another run, or by a process of one that was killed; end it "
                        "first, or give another --run-dir"
                    ) from error
            yield lock.fileno()

    def experiment(self) -> Experiment:
        """Return the run's experiment.

        Raises:
            CommandError: the folder holds no run.
            ExperimentError: its experiment cannot be read.
        """
        if not self.experiment_file.exists():
            raise CommandError(f"{self.path} is not a run folder: it has no {self.experiment_file.name}")
        return load(self.experiment_file)

    @property
    def has_progress(self) -> bool:
        """Whether there is something to resume: a checkpoint, a closed round, or a server at work."""
        from codistill_server.storage.journal import holds_rounds

        return bool(self._weights()) or holds_rounds(self.journal_file) or self.has_server

    @property
    def has_server(self) -> bool:
        """Whether a server is at work in the folder."""
        return is_locked(self.server_lock)

    @property
    def in_use(self) -> bool:
        """Whether a run, or a process of one, is at work in the folder."""
        return is_locked(self.run_lock)

    @property
    def holds_run(self) -> bool:
        """Whether there is a run in the folder, if only one that lost its experiment's file."""
        return self.experiment_file.exists() or self.has_progress

    def check(self, experiment: Experiment, *, resume: bool) -> None:
        """Check that an experiment may be run in the folder.

        A run that trained nothing yet may be replaced: its experiment may be corrected and started again.

        Raises:
            CommandError: the folder holds another run, or holds this one and `resume` is not given, or `resume` is given
                and it holds none. Or it lost its experiment, and nothing else says which run it holds.
        """
        if self.has_progress:
            if not resume:
                lost = "" if self.experiment_file.exists() else f", which has lost its {self.experiment_file.name}"
                raise CommandError(
                    f"run folder {self.path} already holds a run{lost}; give --resume to continue it, or another --run-dir"
                )
            self._check_same(experiment)
        elif resume and not self.experiment_file.exists():
            raise CommandError(
                f"run folder {self.path} holds no run to continue: {self._what_is_missing()}; give the --run-dir of one, "
                "or leave out --resume to start one there"
            )

    def start(self, experiment: Experiment, *, mode: Mode, resume: bool) -> None:
        """Make the folder ready for a run, or for resuming the run that it holds.

        Args:
            experiment: the experiment to run.
            mode: "grpc" or "in-process".
            resume: resume the run in the folder. A warning is logged for each version, processor or module of the user's
                own that is another one than at the last start.

        Raises:
            CommandError: as :meth:`check`, or the folder cannot be written.
        """
        self.check(experiment, resume=resume)
        with self._write_errors():
            if not self.has_progress:
                if resume:
                    _log.warning(
                        "run folder %s: %s; the run begins at its first step", self.path, self._what_is_missing()
                    )
                self._discard()
            self._write_run_files(experiment, mode, experiment.names)

    def join(
        self,
        experiment: Experiment,
        students: Iterable[str] = (),
        seconds: float = 15.0,
        *,
        supervised: bool = False,
    ) -> None:
        """Make the folder a run's for a server or a worker that is started by itself; others may do the same meanwhile.

        Where it is this run's already, nothing is changed except for students that were added to the experiment.

        Args:
            experiment: the experiment to run.
            students: the students whose files will be in the folder.
            seconds: how long to wait for others that do the same.
            supervised: whether the command that uses the folder started this process.

        Raises:
            CommandError: the folder holds another run, cannot be written, or is kept by another process.
        """
        if not supervised and self.in_use:
            # A second worker would take its student from the run's own, and the run would end with that one.
            raise CommandError(
                f"run folder {self.path} is in use by a run, which starts its server and workers itself and again if they "
                "end; end the run first, or give another --run-dir"
            )
        with self._write_errors():
            if not supervised:  # else it is there; one that was deleted meanwhile is not made again
                make_private_folder(self.path)
            with self._hold_start(seconds):
                if self.experiment_file.exists() and identity(self.experiment()) == identity(experiment):
                    return
                if self.has_progress:
                    self._check_same(experiment)
                else:
                    self._discard()
                self._write_run_files(experiment, "grpc", students)

    @contextlib.contextmanager
    def _hold_start(self, seconds: float) -> Generator[None, None, None]:
        """Hold the lock under which the folder is made a run's."""
        with contextlib.ExitStack() as stack:
            try:
                lock = stack.enter_context(locked(self.start_lock, seconds, keep_content=True))
            except TimeoutError as error:
                holder = self.start_lock.read_text().strip() or "unknown"
                raise CommandError(
                    f"run folder {self.path} has been held for {seconds:g} s by another server or worker, which holds "
                    f"{self.start_lock} (process {holder}); it is stopped, or its disk does not answer: end it, then start "
                    "this one again",
                    ExitCode.ERROR,
                ) from error
            with contextlib.suppress(OSError):  # the holder's name helps, but is no reason to fail on a full disk
                os.ftruncate(lock.fileno(), 0)
                os.write(lock.fileno(), f"{os.getpid()} on {platform.node()}".encode())
            yield

    def _check_same(self, experiment: Experiment) -> None:
        """Check that an experiment is the folder's own, apart from students that were added."""
        recorded, given = self._recorded_identity(), identity(experiment)
        differs = difference(recorded, given)
        if differs is not None and extends(recorded, given):
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

    def _recorded_identity(self) -> str:
        """Return the identity of the folder's run: its experiment's, or where that file is gone the journal's or a checkpoint's.

        Raises:
            CommandError: none of them can be read.
        """
        if self.experiment_file.exists():
            return identity(self.experiment())
        from codistill_server.storage.journal import read_identity

        found = read_identity(self.journal_file)
        if found is None and (checkpoints := self._weights()):
            from codistill_worker.training.checkpoints import read_identity as read_identity_of_checkpoint

            found = next(filter(None, map(read_identity_of_checkpoint, checkpoints)), None)
        if found is None:
            raise CommandError(
                f"run folder {self.path} has lost its {self.experiment_file.name}, and neither its journal nor a checkpoint "
                "can be read to tell which run it holds; put the file back from a copy, or give another --run-dir"
            )
        return found

    def _weights(self) -> list[Path]:
        """Return the files of students' weights that are there."""
        files = (path for folder in self.students.glob("*") for path in self.student(folder.name).weights_files)
        return [path for path in files if path.exists()]

    def _what_is_missing(self) -> str:
        """Return what a folder without progress lacks, and what it still holds of a run."""
        if not self.path.is_dir():
            return "there is no such folder"
        missing = "it has no checkpoint in students/*, and no closed round in its journal"
        if not self.experiment_file.exists():
            missing = (
                f"it has no {self.experiment_file.name}, no checkpoint in students/*, and no closed round in a journal"
            )
        left = [path.name for path in (self.info_file, self.journal_file, *self.record_files) if path.exists()]
        return f"{missing}; of a run it holds {', '.join(left)}" if left else missing

    def _discard(self) -> None:
        """Delete the files of a run that never closed a round."""
        for path in (*self.journal_files, *self.record_files):
            path.unlink(missing_ok=True)

    def _write_run_files(self, experiment: Experiment, mode: Mode, students: Iterable[str]) -> None:
        self.students.mkdir(parents=True, exist_ok=True)
        for name in students:
            self.student(name).path.mkdir(exist_ok=True)
        for name in experiment.teacher_names:
            self.teacher(name).path.mkdir(parents=True, exist_ok=True)
        sync_folder(self.students)
        self._record_start(Start.now(mode))
        if self.has_progress and not self.experiment_file.exists():
            _log.warning(
                "%s was missing; it is written again from the experiment given, which is the run's",
                self.experiment_file,
            )
        # Last, as it makes the folder a run's.
        write_atomically(self.experiment_file, experiment.to_yaml())
        sync_folder(self.path.parent)

    def _record_start(self, start: Start) -> None:
        """Record the facts of a start; the first ones stay, and a warning says what has changed since the last."""
        if not self.has_progress:
            write_info(self.info_file, start)
            return
        try:
            before = add_start(self.info_file, start)
        except ValueError as error:
            _log.warning("%s; the facts of this start replace it", error)
            write_info(self.info_file, start)
            return
        warn_of(differences(before, start))

    @contextlib.contextmanager
    def _write_errors(self) -> Generator[None, None, None]:
        """Turn an error of writing into one that says what to do."""
        try:
            yield
        except OSError as error:
            raise CommandError(*unwritable(self.path, error)) from error
