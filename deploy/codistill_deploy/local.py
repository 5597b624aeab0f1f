"""A run on this machine: the server and one worker process per student, kept alive and ended together."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from codistill.exit_codes import ExitCode
from codistill.experiment import Experiment
from codistill.records import Happened
from codistill.security import Security
from codistill.v1 import distillation_pb2 as pb
from codistill.v1.distillation_pb2_grpc import DistillationStub
from codistill_deploy.errors import CommandError
from codistill_deploy.restarts import DEFAULT_RESTARTS, RESTARTS_OFF, GiveUp, Restart
from codistill_deploy.run_folder import RunFolder
from codistill_deploy.supervision import Launch, Member, Port
from codistill_deploy.views import View
from codistill_server.app import ADDRESS_FILE
from codistill_server.history import RESTARTED, SUPERVISOR_FILE
from codistill_server.recorder import Recorder

__all__ = ["LocalOptions", "run_local", "watch"]

_POLL_SECONDS = 0.1
_END_SECONDS = 30.0
_KILL_SECONDS = 5.0
_SETTLE_SECONDS = 1.0
_OPTIONS = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 2_000)]
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


@dataclass(frozen=True)
class LocalOptions:
    """How a local run is run.

    Attributes:
        listen: the server's "HOST:PORT"; port 0 takes a free one.
        metrics: the "HOST:PORT" of the live page and the metrics.
        announce: note the addresses once the server is up.
        search_path: a folder in which `package.module:callable` is looked for, besides the usual ones.
        restarts: how often each process is started again; see :mod:`codistill_deploy.restarts`.
        keep: descriptors that every process inherits: the lock on the run's folder.
        security: TLS and token.
        insecure: listen beyond this machine although nothing protects the port.
    """

    listen: str = "127.0.0.1:0"
    metrics: str = "127.0.0.1:0"
    announce: bool = False
    search_path: Path | None = None
    restarts: int = DEFAULT_RESTARTS
    keep: tuple[int, ...] = ()
    security: Security = field(default_factory=Security)
    insecure: bool = False


def run_local(
    experiment: Experiment, folder: RunFolder, view: View, stop: threading.Event, options: LocalOptions | None = None
) -> ExitCode:
    """Runs an experiment with processes on this machine, and leaves none of them behind.

    Args:
        experiment: what to run.
        folder: the run's folder, started; a run that it holds is gone on with.
        view: where progress is shown.
        stop: set to stop: the students are saved first. The caller may set it from a signal handler.
        options: addresses.

    Returns:
        OK, or INTERRUPTED if it was stopped.

    Raises:
        CommandError: a process ended that the run needs; the text holds its own last line.
    """
    return _LocalRun(experiment, folder, view, options or LocalOptions()).run(stop)


class _LocalRun:
    def __init__(self, experiment: Experiment, folder: RunFolder, view: View, options: LocalOptions) -> None:
        self._experiment = experiment
        self._folder = folder
        self._view = view
        self._options = options
        self._listen = Port(options.listen, "listen")
        self._metrics = Port(options.metrics, "metrics")
        self._recorder: Recorder | None = None
        self._members: list[Member] = []
        self._watcher: threading.Thread | None = None

    def run(self, stop: threading.Event) -> ExitCode:
        address_file = self._folder.path / ADDRESS_FILE
        address_file.unlink(missing_ok=True)
        reading, writing = os.pipe()
        over = threading.Event()
        try:
            self._recorder = _open_recorder(self._folder.path)
            server, workers = self._prepare(reading)
            for member in self._members:
                _start(member)
            return self._supervise(server, workers, stop, over)
        finally:
            for member in self._members:
                member.close()
            over.set()
            if self._watcher is not None:
                self._watcher.join(_KILL_SECONDS)
            os.close(writing)
            os.close(reading)
            self._listen.close()
            self._metrics.close()
            if self._recorder is not None:
                self._recorder.close()

    def _prepare(self, pipe: int) -> tuple[Member, list[Member]]:
        folder, options = self._folder, self._options
        environment = {**os.environ, **options.security.environment}
        if options.search_path is not None:
            paths = [str(options.search_path.resolve()), environment.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        launch = Launch(environment, pipe, options.keep, options.restarts)
        command = [sys.executable, "-m", "codistill_deploy"]
        run = [str(folder.experiment_file), "--run-dir", str(folder.path)]
        # It stays after the run is complete: a worker whose goodbye got no answer says it again, to its successor too.
        serve = ["serve", *run, "--listen", self._listen.address, "--metrics", self._metrics.address, "--stay"]
        serve += ["--insecure"] if options.insecure else []
        server = Member("the server", "", [*command, *serve], folder.server_log, launch, ends=False)
        workers = [
            Member(
                f"student {name!r}", name, [*command, "work", *run, "--student", name], folder.student_log(name), launch
            )
            for name in self._experiment.names
        ]
        self._members = [server, *workers]
        return server, workers

    def _supervise(
        self, server: Member, workers: list[Member], stop: threading.Event, over: threading.Event
    ) -> ExitCode:
        while not stop.wait(_POLL_SECONDS):
            if all(worker.done for worker in workers):
                return self._end(server)
            for member in self._members:
                decision = member.attend(time.monotonic())
                if decision is not None:
                    self._tell(member, decision)
            lost = [member for member in self._members if member.given_up is not None]
            left = any(not worker.done and worker.given_up is None for worker in workers)
            if lost and not (self._goes_on and left and server not in lost):
                raise self._failure(server)
            if self._watcher is None:
                self._watch(over)
        self._view.note("stopping: saving every student (Ctrl-C again to stop at once)")
        for worker in workers:
            worker.tell(signal.SIGTERM)
        self._await(workers, _END_SECONDS)
        server.tell(signal.SIGTERM)
        self._await([server], _END_SECONDS)
        return ExitCode.INTERRUPTED

    @property
    def _goes_on(self) -> bool:
        """Whether the other students train on when one is given up; the run still ends with that one's error."""
        experiment = self._experiment
        return experiment.exchange.on_absence == "proceed" and experiment.distillation.exchanges

    def _watch(self, over: threading.Event) -> None:
        """Begins to show the run once its server is up; its successors have the same address."""
        try:
            server = json.loads((self._folder.path / ADDRESS_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if self._options.announce:
            web = f"http://{server['metrics']}"
            self._view.note(f"live page: {web}/ (server {server['address']}, metrics on {web}/metrics)")
        arguments = (server["address"], self._view.update, over, self._options.security)
        self._watcher = threading.Thread(target=watch, args=arguments, name="codistill-watch", daemon=True)
        self._watcher.start()

    def _end(self, server: Member) -> ExitCode:
        """Ends the server of a run in which every student has finished."""
        server.tell(signal.SIGTERM)
        self._await([server], _END_SECONDS)
        if (server.code or 0) > 0:
            server.examine(time.monotonic())
            raise _error(server, self._folder)
        return ExitCode.OK  # where it was killed at the last moment, nobody needed it any more

    def _tell(self, member: Member, decision: Restart | GiveUp) -> None:
        """Writes down, and shows, what became of a process."""
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

    def _await(self, members: list[Member], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(member.running for member in members):
            time.sleep(_POLL_SECONDS / 2)

    def _failure(self, server: Member) -> CommandError:
        """Returns the error of the process that failed first, as far as can be told."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        while time.monotonic() < deadline and any(member.running for member in self._members):
            time.sleep(_POLL_SECONDS / 2)
        for member in self._members:
            member.attend(time.monotonic(), start=False)
        failed = [member for member in self._members if member.given_up is not None]
        server.tell(signal.SIGTERM)  # it writes down what it knows of the last rounds
        self._await([server], _KILL_SECONDS)
        return _error(min(failed, key=lambda member: member.code in _FOLLOWERS), self._folder)


def _start(member: Member) -> None:
    try:
        member.start(time.monotonic())
    except OSError as error:
        raise CommandError(f"{member.title} cannot be started: {error}", ExitCode.WORKER_FAILED) from error


def _error(member: Member, folder: RunFolder) -> CommandError:
    ending = member.ending
    assert ending is not None  # noqa: S101 - only what has ended can have failed
    why = f"; not started again: {member.given_up}" if member.given_up and member.given_up != RESTARTS_OFF else ""
    if ending.code <= 0:
        return CommandError(
            f"{member.title} {ending}{why}; its log: {member.log}; `codistill run … --run-dir {folder.path} --resume` goes on",
            ExitCode.WORKER_FAILED,
        )
    code = ExitCode(ending.code) if ending.code in _PASSED_ON else ExitCode.WORKER_FAILED
    return CommandError(f"{member.title} {ending}{why} (log: {member.log})", code)


def _open_recorder(folder: Path) -> Recorder:
    try:
        return Recorder(folder, events=SUPERVISOR_FILE, metrics=None)
    except OSError as error:
        raise CommandError(f"run folder {folder} cannot be written: {error.strerror}") from error


def watch(
    address: str,
    show: Callable[[pb.Run], None],
    over: threading.Event,
    security: Security | None = None,
    interval: float = 0.5,
) -> None:
    """Shows where a run stands again and again, until it is over; while the server is away, it waits for it.

    Args:
        address: the server's "HOST:PORT".
        show: called with each state, from this thread.
        over: set to stop.
        security: TLS and token.
        interval: seconds between two states.
    """
    with (security or Security()).channel(address, _OPTIONS) as channel:
        stub = DistillationStub(channel)
        while not over.is_set():
            try:
                for run in stub.WatchRun(pb.WatchRunRequest(interval_seconds=interval)):
                    show(run)
                    if over.is_set() or run.complete:
                        return
            except grpc.RpcError:
                over.wait(interval)
