"""A run's server and workers, wherever they live: started together, kept alive, shown, and ended together."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence

import grpc

from codistill.config.experiment import Experiment
from codistill.process.exit_codes import ExitCode
from codistill.rundir.address import Addresses, read_addresses
from codistill.rundir.history import RESTARTED
from codistill.rundir.records import Happened
from codistill.rundir.writer import RecordWriter
from codistill.v1 import distillation_pb2 as pb
from codistill.v1.distillation_pb2_grpc import DistillationStub
from codistill.wire.security import Security
from codistill_deploy.console.progress import View
from codistill_deploy.errors import CommandError
from codistill_deploy.run_folder import RunFolder
from codistill_deploy.supervise.child import Child
from codistill_deploy.supervise.restart_policy import RESTARTS_OFF, GiveUp, Restart

__all__ = ["Supervisor", "watch"]

_POLL_SECONDS = 0.1
_END_SECONDS = 30.0
_KILL_SECONDS = 5.0
_SETTLE_SECONDS = 1.0
_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.keepalive_time_ms", 10_000),  # a machine that vanished says nothing
    ("grpc.keepalive_timeout_ms", 10_000),
]
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
)


class Supervisor:
    """The parts of one run.

    Args:
        experiment: what is run.
        folder: the run's folder, started.
        view: where progress is shown.
        security: TLS and token, to ask the server where the run stands.
        again: the command that goes on with the run, for errors.
        tend: called again and again while the run goes on; what it raises ends the run.
    """

    def __init__(
        self,
        experiment: Experiment,
        folder: RunFolder,
        view: View,
        security: Security,
        *,
        again: str,
        on_poll: Callable[[], None] = lambda: None,
    ) -> None:
        self._experiment = experiment
        self._folder = folder
        self._view = view
        self._security = security
        self._again = again
        self._tend = on_poll
        self._recorder: RecordWriter | None = None
        self._members: list[Child] = []
        self._watcher: threading.Thread | None = None

    def run(
        self, server: Child, workers: Sequence[Child], stop: threading.Event, *, announce: bool = False
    ) -> ExitCode:
        """Runs to the end, and leaves no member alive.

        Args:
            server: the server.
            workers: a worker for each student.
            stop: set to stop: the students are saved first.
            announce: note the server's addresses, each time that they are new.

        Returns:
            OK, or INTERRUPTED if it was stopped.

        Raises:
            CommandError: a member ended that the run needs; the text holds its own last line.
        """
        self._folder.address_file.unlink(missing_ok=True)
        over = threading.Event()
        self._members = [server, *workers]
        try:
            self._recorder = _open_recorder(self._folder)
            for member in self._members:
                _start(member)
            self._watch(over, announce)
            return self._supervise(server, workers, stop)
        finally:
            for member in self._members:
                member.close()
            over.set()
            if self._watcher is not None:
                self._watcher.join(_KILL_SECONDS)
            if self._recorder is not None:
                self._recorder.close()

    def _supervise(self, server: Child, workers: Sequence[Child], stop: threading.Event) -> ExitCode:
        while not stop.wait(_POLL_SECONDS):
            if all(worker.done for worker in workers):
                return self._end(server)
            for member in self._members:
                decision = member.poll(time.monotonic())
                if decision is not None:
                    self._tell(member, decision)
            lost = [member for member in self._members if member.given_up is not None]
            left = any(not worker.done and worker.given_up is None for worker in workers)
            if lost and not (self._goes_on and left and server not in lost):
                raise self._failure(server)
            self._tend()
        self._view.note("stopping: saving every student (Ctrl-C again to stop at once)")
        for worker in workers:
            worker.tell(signal.SIGTERM)
        self._await(workers, _END_SECONDS)
        for worker in workers:
            if worker.running:
                self._view.note(
                    f"{worker.title} did not save itself within {_END_SECONDS:g} s and is killed; it goes on from its last "
                    "checkpoint"
                )
        server.tell(signal.SIGTERM)
        self._await([server], _END_SECONDS)
        return ExitCode.INTERRUPTED

    @property
    def _goes_on(self) -> bool:
        """Whether the other students train on when one is given up; the run still ends with that one's error."""
        experiment = self._experiment
        return experiment.exchange.on_absence == "proceed" and experiment.distillation.exchanges

    def _watch(self, over: threading.Event, announce: bool) -> None:
        """Shows the run from another thread, whenever there is a server to ask."""
        told: Addresses | None = None

        def find() -> str | None:
            nonlocal told
            found = read_addresses(self._folder.address_file)
            if announce and found is not None and found != told:
                self._view.note(str(found))
                told = found
            return None if found is None else found.server

        arguments = (find, self._view.update, over, self._security)
        self._watcher = threading.Thread(target=watch, args=arguments, name="codistill-watch", daemon=True)
        self._watcher.start()

    def _end(self, server: Child) -> ExitCode:
        """Ends the server of a run in which every student has finished."""
        server.tell(signal.SIGTERM)
        self._await([server], _END_SECONDS)
        if (server.code or 0) > 0:
            server.examine(time.monotonic())
            raise self._error(server)
        return ExitCode.OK  # where it was killed at the last moment, nobody needed it any more

    def _tell(self, member: Child, decision: Restart | GiveUp) -> None:
        """Writes down, and shows, what became of a member."""
        how = str(member.ending)
        if isinstance(decision, Restart):
            what = RESTARTED
            message = f"{how}; started again in {decision.after:g} s, restart {decision.number} of {decision.limit}"
            self._view.note(f"{member.title} {message}")
        else:
            what, message = "gave_up", f"{how}; not started again: {decision.reason}"
            if member.student and self._goes_on:
                self._view.note(f"{member.title} {message}; the others go on without it")
        if self._recorder is not None:
            who = message if member.student else f"{member.title} {message}"
            self._recorder.write(Happened(time=time.time(), what=what, student=member.student, message=who))

    def _await(self, members: Sequence[Child], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(member.running for member in members):
            time.sleep(_POLL_SECONDS / 2)

    def _failure(self, server: Child) -> CommandError:
        """Returns the error of the member that failed first, as far as can be told."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        while time.monotonic() < deadline and any(member.running for member in self._members):
            time.sleep(_POLL_SECONDS / 2)
        for member in self._members:
            member.poll(time.monotonic(), start=False)
        failed = [member for member in self._members if member.given_up is not None]
        server.tell(signal.SIGTERM)  # it writes down what it knows of the last rounds
        self._await([server], _KILL_SECONDS)
        return self._error(min(failed, key=lambda member: member.code in _FOLLOWERS))

    def _error(self, member: Child) -> CommandError:
        ending = member.ending
        assert ending is not None  # noqa: S101 - only what has ended can have failed
        why = f"; not started again: {member.given_up}" if member.given_up and member.given_up != RESTARTS_OFF else ""
        if ending.code <= 0:
            return CommandError(
                f"{member.title} {ending}{why}; its log: {member.log}; `{self._again}` goes on", ExitCode.WORKER_FAILED
            )
        code = ExitCode(ending.code) if ending.code in _PASSED_ON else ExitCode.WORKER_FAILED
        return CommandError(f"{member.title} {ending}{why} (log: {member.log})", code)


def _start(member: Child) -> None:
    try:
        member.start(time.monotonic())
    except OSError as error:
        raise CommandError(f"{member.title} cannot be started: {error}", ExitCode.WORKER_FAILED) from error


def _open_recorder(folder: RunFolder) -> RecordWriter:
    try:
        return RecordWriter(folder.supervisor_file)
    except OSError as error:
        raise CommandError(
            f"run folder {folder.path} cannot be written: {error.strerror}; make it writable, or give another --run-dir"
        ) from error


def watch(
    find: Callable[[], str | None],
    show: Callable[[pb.Run], None],
    over: threading.Event,
    security: Security | None = None,
    interval: float = 0.5,
) -> None:
    """Shows where a run stands again and again, until it is over; while the server is away, it waits for it.

    Args:
        find: returns the server's "HOST:PORT", which may have moved; None while there is none.
        show: called with each state, from this thread.
        over: set to stop.
        security: TLS and token.
        interval: seconds between two states.
    """
    while not over.is_set():
        address = find()
        if address is None:
            over.wait(interval)
            continue
        with (security or Security()).channel(address, _OPTIONS) as channel:
            try:
                for run in DistillationStub(channel).WatchRun(pb.WatchRunRequest(interval_seconds=interval)):
                    show(run)
                    if over.is_set() or run.complete:
                        return
            except grpc.RpcError:
                over.wait(interval)
