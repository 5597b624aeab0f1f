"""The actor: runs one process of a run on the node that it came up on, and tells how that ended.

Nothing here needs Ray but the node's address; an actor is light and imports neither torch nor gRPC, as its process does.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from codistill.process.exit_codes import ExitCode
from codistill.rundir.files import locked
from codistill.rundir.layout import RunLayout
from codistill.wire.channel import format_address
from codistill_deploy.errors import CommandError
from codistill_deploy.supervise.process import Launch, Process
from codistill_deploy.supervise.restart_policy import Ending

__all__ = ["ADVERTISE_VARIABLE", "Placement", "ProcessActor", "Serving", "Task"]

ADVERTISE_VARIABLE = "CODISTILL_ADVERTISE"
"""Set on a node, the host by which the others reach it."""

_POLL_SECONDS = 0.05
_ORPHAN_SECONDS = 0.5
_SEEN_SECONDS = 15.0  # a network file system may show a new file late
_PREDECESSOR_SECONDS = 90.0  # a node that was lost may live on, and a file server keeps a lost node's locks for a while


@dataclass(frozen=True)
class Serving:
    """Where a server listens: on its node's address, or on all where another host is advertised.

    Attributes:
        port: of the exchange; 0 for a free one.
        metrics_port: of the metrics; None leaves them on the node's loopback.
        advertise: the host by which the others reach it; None for the node's own.
    """

    port: int = 0
    metrics_port: int | None = None
    advertise: str | None = None

    def options(self, node: str) -> list[str]:
        """Returns what `codistill serve` is given on a node."""
        host = "0.0.0.0" if self.advertise else node  # noqa: S104 - who sets it means another way to this node
        metrics = "127.0.0.1:0" if self.metrics_port is None else format_address(host, self.metrics_port)
        options = ["--listen", format_address(host, self.port), "--metrics", metrics]
        return [*options, "--advertise", self.advertise] if self.advertise else options


@dataclass(frozen=True)
class Task:
    """One life of a part of a run.

    Attributes:
        folder: the run's folder.
        marker: what the marker file must hold.
        arguments: the command line, after the Python.
        log: the file for its output.
        hang_after: seconds without a sign of life after which it is killed.
        lock: the file that keeps its successor waiting for as long as it lives.
        environment: what it needs besides what it inherits. It may hold the token, so it is never shown.
        search_path: a folder with the user's own modules; one that is not absolute is looked for in the job's files.
        serving: where it listens, if it is the server.
    """

    folder: Path
    marker: str
    arguments: Sequence[str]
    log: Path
    hang_after: float
    lock: Path
    environment: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    search_path: Path = Path()
    serving: Serving | None = None


@dataclass(frozen=True)
class Placement:
    """Where an actor came up."""

    node: str
    address: str


class ProcessActor:
    """Runs one process, once.

    Args:
        address: the node's, if it is not to be asked of Ray.
    """

    def __init__(self, address: str | None = None) -> None:
        self._given = address
        if address is None:
            _end_with_raylet()
        self._guard = threading.Lock()
        self._process: Process | None = None
        self._asked_to_end = False

    def where(self) -> Placement:
        """Returns on which node this is."""
        import ray

        return Placement(ray.get_runtime_context().get_node_id(), self._address())

    def run(self, task: Task) -> Ending:
        """Runs a process to its end, and returns how that was; a task that cannot be begun ends as if it had failed."""
        begun = time.monotonic()
        try:
            self._check_shared(task)
            with locked(task.lock, _PREDECESSOR_SECONDS) as lock:
                return self._live(task, lock.fileno(), begun)
        except CommandError as error:
            return Ending(error.code, str(error), time.monotonic() - begun)
        except TimeoutError:
            line = f"{task.lock} is held by a predecessor, on a node that was lost perhaps; end it, and start the run again"
            return Ending(ExitCode.ERROR, line, time.monotonic() - begun)
        except OSError as error:
            line = f"{task.folder} cannot be used on node {self._address()}: {error.strerror or error}"
            return Ending(ExitCode.ERROR, line, time.monotonic() - begun)

    def tell(self, number: int) -> None:
        """Sends the process a signal; one that has not begun will not."""
        with self._guard:
            self._asked_to_end = True
            if self._process is not None:
                self._process.tell(signal.Signals(number))

    def _live(self, task: Task, lock: int, begun: float) -> Ending:
        arguments = [sys.executable, *task.arguments]
        if task.serving is not None:
            arguments += _advertised(task.serving).options(self._address())
        reading, writing = os.pipe()
        try:
            launch = Launch(_environment(task), reading, (lock,))
            with self._guard:
                if self._asked_to_end:
                    return Ending(ExitCode.INTERRUPTED, "it was asked to end before it began")
                process = self._process = Process(arguments, task.log, launch, task.hang_after)
            try:
                while process.code is None:
                    time.sleep(_POLL_SECONDS)
                return process.ending(time.monotonic() - begun)
            finally:
                process.close()
        finally:
            os.close(writing)
            os.close(reading)

    def _check_shared(self, task: Task) -> None:
        """Checks that this node sees the run's folder as the driver does."""
        deadline = time.monotonic() + _SEEN_SECONDS
        while _read(RunLayout(task.folder).driver_file) != task.marker:
            if time.monotonic() >= deadline:
                raise CommandError(
                    f"run folder {task.folder} is not shared: node {self._address()} ({socket.gethostname()}) does not see there "
                    "what the driver wrote; give a --run-dir on storage that every node mounts at the same path"
                )
            time.sleep(_POLL_SECONDS)

    def _address(self) -> str:
        if self._given is not None:
            return self._given
        import ray

        here = ray.get_runtime_context().get_node_id()
        return next(str(node["NodeManagerAddress"]) for node in ray.nodes() if node["NodeID"] == here)


def _end_with_raylet() -> None:
    """Ends this actor when its node's Ray has died, of which the actor is a child.

    Ray takes the actor for dead then, and yet lets it live for as long as a call of it runs. Its process follows it.
    """
    raylet = os.getppid()

    def wait() -> None:
        while os.getppid() == raylet:
            time.sleep(_ORPHAN_SECONDS)
        os._exit(ExitCode.INTERRUPTED)

    threading.Thread(target=wait, name="codistill-raylet", daemon=True).start()


def _advertised(serving: Serving) -> Serving:
    """Returns what is served, as this node wants it to be known unless the command said."""
    named = os.environ.get(ADVERTISE_VARIABLE)
    if serving.advertise is None and named:
        return Serving(serving.port, serving.metrics_port, named)
    return serving


def _environment(task: Task) -> dict[str, str]:
    environment = {**os.environ, **task.environment}
    paths = [str(Path.cwd() / task.search_path), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return environment


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None
