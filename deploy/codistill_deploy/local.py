"""A run on this machine: the server and one worker process per student, started, watched and ended together."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import grpc

from codistill.exit_codes import ExitCode
from codistill.experiment import Experiment
from codistill.security import Security
from codistill.v1 import distillation_pb2 as pb
from codistill.v1.distillation_pb2_grpc import DistillationStub
from codistill_deploy.errors import CommandError
from codistill_deploy.parent import PARENT_VARIABLE
from codistill_deploy.run_folder import RunFolder
from codistill_deploy.views import View
from codistill_server.app import ADDRESS_FILE

__all__ = ["LocalOptions", "run_local", "watch"]

_POLL_SECONDS = 0.1
_START_SECONDS = 120.0
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
)


@dataclass(frozen=True)
class LocalOptions:
    """How a local run is run.

    Attributes:
        listen: the server's "HOST:PORT"; port 0 takes a free one.
        metrics: the metrics' "HOST:PORT".
        announce: note the addresses once the server is up.
        search_path: a folder in which `package.module:callable` is looked for, besides the usual ones.
        security: TLS and token.
        insecure: listen beyond this machine although nothing protects the port.
    """

    listen: str = "127.0.0.1:0"
    metrics: str = "127.0.0.1:0"
    announce: bool = False
    search_path: Path | None = None
    security: Security = field(default_factory=Security)
    insecure: bool = False


class _Child:
    """A process of ours and its log."""

    def __init__(self, name: str, command: list[str], log: Path, environment: dict[str, str], pipe: int) -> None:
        self.name = name
        self.log = log
        self._file: BinaryIO = log.open("ab")
        self._start = log.stat().st_size
        # A session of its own keeps the terminal's Ctrl-C from it: what it is told, the parent tells it.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "codistill_deploy", *command],
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            env={**environment, PARENT_VARIABLE: str(pipe)},
            pass_fds=(pipe,),
            start_new_session=True,
        )

    @property
    def code(self) -> int | None:
        """The exit code, or None while it runs."""
        return self.process.poll()

    def tell(self, number: signal.Signals) -> None:
        """Sends a signal if it still runs."""
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    def last_error(self) -> str:
        """Returns the last error line that it printed, or its last line."""
        with self.log.open("rb") as file:
            file.seek(self._start)
            lines = file.read().decode(errors="replace").splitlines()
        errors = [line.partition("error: ")[2] for line in lines if line.startswith("error: ")]
        return errors[-1] if errors else (lines[-1].strip() if lines else "it printed nothing")

    def close(self) -> None:
        """Kills it if it still runs, and closes its log."""
        self.tell(signal.SIGKILL)
        self.process.wait()
        self._file.close()


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
        self._children: list[_Child] = []

    def run(self, stop: threading.Event) -> ExitCode:
        address_file = self._folder.path / ADDRESS_FILE
        address_file.unlink(missing_ok=True)
        reading, writing = os.pipe()
        watcher: threading.Thread | None = None
        over = threading.Event()
        try:
            server, workers = self._start(reading)
            address = self._address(address_file, stop)
            if address is not None:
                view = self._view
                watcher = threading.Thread(
                    target=watch,
                    args=(address, view.update, over, self._options.security),
                    name="codistill-watch",
                    daemon=True,
                )
                watcher.start()
            return self._supervise(server, workers, stop)
        finally:
            for child in self._children:
                child.close()
            over.set()
            if watcher is not None:
                watcher.join(_KILL_SECONDS)
            os.close(writing)
            os.close(reading)

    def _start(self, pipe: int) -> tuple[_Child, list[_Child]]:
        folder, options = self._folder, self._options
        environment = {**os.environ, **options.security.environment}
        if options.search_path is not None:
            paths = [str(options.search_path.resolve()), environment.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        run = ["--run-dir", str(folder.path)]
        serve = ["serve", str(folder.experiment_file), *run, "--listen", options.listen, "--metrics", options.metrics]
        serve += ["--insecure"] if options.insecure else []
        server = _Child("the server", serve, folder.server_log, environment, pipe)
        self._children.append(server)
        workers: list[_Child] = []
        for name in self._experiment.names:
            command = ["work", str(folder.experiment_file), "--student", name, *run]
            child = _Child(f"student {name!r}", command, folder.student_log(name), environment, pipe)
            self._children.append(child)
            workers.append(child)
        return server, workers

    def _address(self, path: Path, stop: threading.Event) -> str | None:
        """Returns the server's address once it listens; None if something ends before."""
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and not stop.is_set():
            if path.exists():
                server = json.loads(path.read_text(encoding="utf-8"))
                if self._options.announce:
                    self._view.note(f"server {server['address']}, metrics on http://{server['metrics']}/metrics")
                return str(server["address"])
            if any(child.code is not None for child in self._children):
                return None
            time.sleep(_POLL_SECONDS / 2)
        return None

    def _supervise(self, server: _Child, workers: list[_Child], stop: threading.Event) -> ExitCode:
        while not stop.wait(_POLL_SECONDS):
            if any(worker.code not in (None, 0) for worker in workers):
                raise self._failure(workers)
            if all(worker.code == 0 for worker in workers):
                self._await([server], _END_SECONDS)
                if server.code != 0:
                    raise self._failure([server])
                return ExitCode.OK
            if server.code is not None and any(worker.code is None for worker in workers):
                # The last worker to leave completes the run; it may end a moment after the server.
                self._await(workers, _KILL_SECONDS if server.code == 0 else 0)
                if not all(worker.code == 0 for worker in workers):
                    raise self._failure([server] if server.code else workers)
        self._view.note("stopping: saving every student (Ctrl-C again to stop at once)")
        for worker in workers:
            worker.tell(signal.SIGTERM)
        self._await(workers, _END_SECONDS)
        server.tell(signal.SIGTERM)
        self._await([server], _END_SECONDS)
        return ExitCode.INTERRUPTED

    def _await(self, children: list[_Child], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(child.code is None for child in children):
            time.sleep(_POLL_SECONDS / 2)

    def _failure(self, children: list[_Child]) -> CommandError:
        """Returns the error of the process that failed first, as far as can be told."""
        self._await(children, _SETTLE_SECONDS)
        failed = [child for child in children if child.code not in (None, 0)] or children
        first = min(failed, key=lambda child: child.code in _FOLLOWERS)
        code = first.code
        if code is None:
            return CommandError(f"{first.name} did not end; its log: {first.log}", ExitCode.WORKER_FAILED)
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            return CommandError(
                f"{first.name} {how}; its log: {first.log}; `codistill run … --run-dir {self._folder.path} --resume` goes on",
                ExitCode.WORKER_FAILED,
            )
        passed = ExitCode(code) if code in _PASSED_ON else ExitCode.WORKER_FAILED
        return CommandError(
            f"{first.name} ended with exit code {code}: {first.last_error()} (log: {first.log})", passed
        )


def watch(
    address: str,
    show: Callable[[pb.Run], None],
    over: threading.Event,
    security: Security | None = None,
    interval: float = 0.5,
) -> None:
    """Shows where a run stands again and again, until it is over or the server is gone.

    Args:
        address: the server's "HOST:PORT".
        show: called with each state, from this thread.
        over: set to stop.
        security: TLS and token.
        interval: seconds between two states.
    """
    with (security or Security()).channel(address) as channel:
        stub = DistillationStub(channel)
        while not over.is_set():
            try:
                for run in stub.WatchRun(pb.WatchRunRequest(interval_seconds=interval)):
                    show(run)
                    if over.is_set() or run.complete:
                        return
            except grpc.RpcError:
                over.wait(interval)
