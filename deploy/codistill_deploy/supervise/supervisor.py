"""A run's server and workers, on whatever machine: started together, kept alive, shown, and ended together."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from codistill.config.experiment import Experiment
from codistill.process.exit_codes import ExitCode
from codistill.rundir.address import Addresses, read_addresses
from codistill.rundir.history import RESTARTED
from codistill.rundir.records import Happened
from codistill.rundir.storage import (
    FolderGuard,
    StorageError,
    describe_disk,
    detail,
    outlasts_restarts,
    unwritable,
)
from codistill.rundir.writer import RecordWriter
from codistill.wire.security import Security
from codistill_deploy.console.progress import ProgressView
from codistill_deploy.errors import CommandError
from codistill_deploy.run_folder import RunFolder
from codistill_deploy.supervise.child import Child
from codistill_deploy.supervise.restart_policy import RESTARTS_OFF, GiveUp, Restart
from codistill_deploy.supervise.status_client import watch_status
from codistill_deploy.supervise.worker_lines import WorkerLines

__all__ = ["Supervisor"]

_POLL_SECONDS = 0.1
_LINES_SECONDS = 1.0
_END_SECONDS = 30.0
_KILL_SECONDS = 5.0
_SETTLE_SECONDS = 1.0
# A worker that fails makes others fail; the codes of the followers, which say least, come last.
_FOLLOWERS = (ExitCode.INTERRUPTED, ExitCode.UNREACHABLE, ExitCode.GAVE_UP, ExitCode.ERROR)
_PASSED_ON = (
    ExitCode.CONFIGURATION,
    ExitCode.REFUSED,
    ExitCode.UNREACHABLE,
    ExitCode.GAVE_UP,
    ExitCode.DIVERGED,
    ExitCode.OUT_OF_MEMORY,
    ExitCode.HUNG,
    ExitCode.STORAGE,
    ExitCode.DEVICE_FAILED,
)


class Supervisor:
    """Runs the processes of one run to its end.

    Args:
        experiment: what is run.
        folder: the run's folder, started.
        view: where progress is shown.
        security: TLS and token, to ask the server where the run stands.
        resume_command: the command that resumes the run, for errors.
        on_poll: called after each poll of the processes; what it raises ends the run.
    """

    def __init__(
        self,
        experiment: Experiment,
        folder: RunFolder,
        view: ProgressView,
        security: Security,
        *,
        resume_command: str,
        on_poll: Callable[[], None] = lambda: None,
    ) -> None:
        self._experiment = experiment
        self._folder = folder
        self._view = view
        self._security = security
        self._resume_command = resume_command
        self._on_poll = on_poll
        self._writer: RecordWriter | None = None
        self._children: list[Child] = []
        self._watcher: threading.Thread | None = None

    def run(
        self, server: Child, workers: Sequence[Child], stop: threading.Event, *, announce: bool = False
    ) -> ExitCode:
        """Run to the end, and leave no child alive.

        Args:
            server: the server.
            workers: a worker for each participant.
            stop: set to stop: the students are saved first.
            announce: note the server's addresses, each time that they are new.

        Returns:
            OK, or INTERRUPTED if it was stopped.

        Raises:
            CommandError: a child ended that the run needs; the text holds its own last line.
        """
        over = threading.Event()
        self._children = [server, *workers]
        try:
            self._writer = _open_writer(self._folder)
            guard = self._guard()
            lines = WorkerLines(worker.log for worker in workers)
            with contextlib.suppress(OSError):  # the address of one that was killed must not be taken for this one's
                self._folder.address_file.unlink(missing_ok=True)
            for child in self._children:
                _start(child)
            self._start_watcher(over, announce)
            try:
                code = self._supervise(server, workers, stop, guard, lines)
            finally:
                self._show(lines)
            guard.check()
        except StorageError as error:
            for child in self._children:
                child.send_signal(signal.SIGTERM)  # what can still be saved is
            _wait_for(self._children, _END_SECONDS)
            raise CommandError(str(error), error.code) from error
        else:
            return code
        finally:
            for child in self._children:
                child.close()
            over.set()
            if self._watcher is not None:
                self._watcher.join(_KILL_SECONDS)
            if self._writer is not None:
                self._writer.close()

    def _guard(self) -> FolderGuard:
        """Return the guard of the run's folder as it is now, with what lasts for the whole run."""
        folder, experiment = self._folder, self._experiment
        students = [folder.student(name).path for name in experiment.names]
        teachers = [folder.teacher(name).path for name in experiment.teacher_names]
        inside = [folder.experiment_file, folder.supervisor_file, *students, *teachers]
        return FolderGuard("run folder", folder.path, "its journal, records and checkpoints", inside)

    def _supervise(
        self, server: Child, workers: Sequence[Child], stop: threading.Event, guard: FolderGuard, lines: WorkerLines
    ) -> ExitCode:
        show_at = 0.0
        while not stop.wait(_POLL_SECONDS):
            guard.check()  # before anything is started again, and so writes to a folder that is not the run's
            if all(worker.done for worker in workers):
                return self._end_server(server)
            for child in self._children:
                decision = child.poll(time.monotonic())
                if decision is not None:
                    self._record(child, decision)
            lost = [child for child in self._children if child.given_up is not None]
            at_work = any(not worker.done and worker.given_up is None for worker in workers)
            if lost and not (self._proceeds and at_work and server not in lost):
                raise self._failure(server)
            if time.monotonic() >= show_at:
                self._show(lines)
                show_at = time.monotonic() + _LINES_SECONDS
            self._on_poll()
        self._stop(server, workers)
        return ExitCode.INTERRUPTED

    @property
    def _proceeds(self) -> bool:
        """Whether the others train on when a participant is given up; the run still ends with that one's error."""
        experiment = self._experiment
        return experiment.exchange.on_absence == "proceed" and experiment.distillation.exchanges

    def _start_watcher(self, over: threading.Event, announce: bool) -> None:
        """Show the run from another thread, whenever there is a server to ask."""
        announced: Addresses | None = None

        def find_address() -> str | None:
            nonlocal announced
            found = read_addresses(self._folder.address_file)
            if announce and found is not None and found != announced:
                self._view.note(str(found))
                announced = found
            return None if found is None else found.server

        arguments = (find_address, self._view.update, over, self._security)
        self._watcher = threading.Thread(target=watch_status, args=arguments, name="codistill-watch", daemon=True)
        self._watcher.start()

    def _stop(self, server: Child, workers: Sequence[Child]) -> None:
        """Save every student, then end the server."""
        self._view.note("stopping: saving every student (Ctrl-C again to stop at once)")
        for worker in workers:
            worker.send_signal(signal.SIGTERM)
        _wait_for(workers, _END_SECONDS)
        for worker in workers:
            if worker.running:
                self._view.note(
                    f"{worker.title} did not save itself within {_END_SECONDS:g} s and is killed; it resumes from its last "
                    "checkpoint"
                )
        server.send_signal(signal.SIGTERM)
        _wait_for([server], _END_SECONDS)

    def _end_server(self, server: Child) -> ExitCode:
        """End the server of a run in which every participant has finished."""
        server.send_signal(signal.SIGTERM)
        _wait_for([server], _END_SECONDS)
        if (server.code or 0) > 0:
            server.record_ending(time.monotonic())
            raise self._error(server)
        self._check_results()
        return ExitCode.OK  # where it was killed at the last moment, nobody needed it any more

    def _check_results(self) -> None:
        """Check that the folder of a run that has ended well holds what it is to hold.

        Raises:
            StorageError: something is missing.
        """
        folder = self._folder
        results = [folder.experiment_file, folder.journal_file, folder.metrics_file, folder.events_file]
        results += [folder.student(name).checkpoint for name in self._experiment.names]
        # A list of the folder is new even where a network file system remembers for a while that a file was not there.
        missing = [str(path) for path in results if path.name not in _names_in(path.parent)]
        if missing:
            raise StorageError(
                f"run folder {folder.path} has lost {', '.join(missing)}, deleted or moved while the run was going on; put it "
                "back from a copy, or start the run anew in another folder"
            )

    def _show(self, lines: WorkerLines) -> None:
        for line in lines.new():
            self._view.note(line)

    def _record(self, child: Child, decision: Restart | GiveUp) -> None:
        """Record what was decided about a child that ended, and show it."""
        ending = str(child.ending)
        if isinstance(decision, Restart):
            kind = RESTARTED
            message = f"{ending}; started again in {decision.after:g} s, restart {decision.number} of {decision.limit}"
            self._view.note(f"{child.title} {message}")
        else:
            kind, message = "gave_up", f"{ending}; not started again: {decision.reason}"
            if child.participant and self._proceeds:
                self._view.note(f"{child.title} {message}; the others go on without it")
        if self._writer is not None:
            line = message if child.participant else f"{child.title} {message}"
            self._writer.write(Happened(time=time.time(), what=kind, participant=child.participant, message=line))

    def _failure(self, server: Child) -> CommandError:
        """Return the error of the child that most likely failed first."""
        _wait_for(self._children, _SETTLE_SECONDS)
        for child in self._children:
            child.poll(time.monotonic(), restart=False)
        failed = [child for child in self._children if child.given_up is not None]
        server.send_signal(signal.SIGTERM)  # it records the last rounds before it ends
        _wait_for([server], _KILL_SECONDS)
        return self._error(min(failed, key=lambda child: child.code in _FOLLOWERS))

    def _error(self, child: Child) -> CommandError:
        ending = child.ending
        assert ending is not None  # noqa: S101 - only what has ended can have failed
        reason = f"; not started again: {child.given_up}" if child.given_up and child.given_up != RESTARTS_OFF else ""
        if ending.code <= 0:
            return CommandError(
                f"{child.title} {ending}{reason}; its log: {child.log}; continue with: {self._resume_command}",
                ExitCode.WORKER_FAILED,
            )
        code = ExitCode(ending.code) if ending.code in _PASSED_ON else ExitCode.WORKER_FAILED
        # On a full disk its log may have had no room for its last line.
        told = "mounted at" in ending.line or "ulimit" in ending.line
        disk = f"; {describe_disk(child.log)}" if code is ExitCode.STORAGE and not told else ""
        return CommandError(f"{child.title} {ending}{reason} (log: {child.log}){disk}", code)


def _start(child: Child) -> None:
    try:
        child.start(time.monotonic())
    except OSError as error:
        code = ExitCode.STORAGE if outlasts_restarts(error) else ExitCode.WORKER_FAILED
        raise CommandError(f"{child.title} cannot be started: {error}{detail(error, child.log)}", code) from error


def _names_in(folder: Path) -> list[str]:
    """Return the names in a folder; none if it is not there."""
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:
        return []


def _wait_for(children: Sequence[Child], seconds: float) -> None:
    """Wait until all have ended, for so long at most."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(child.running for child in children):
        time.sleep(_POLL_SECONDS / 2)


def _open_writer(folder: RunFolder) -> RecordWriter:
    try:
        return RecordWriter(folder.supervisor_file)
    except OSError as error:
        raise CommandError(*unwritable(folder.path, error)) from error
