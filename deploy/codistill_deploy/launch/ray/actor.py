"""The actor: runs one process of a run on the node that it came up on, and returns how that ended.

It needs Ray only for its node's address. It is light: torch and gRPC are imported by its process, not here.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

from codistill.process.exit_codes import ExitCode
from codistill.rundir.files import locked
from codistill.rundir.layout import RunLayout
from codistill.rundir.storage import explain, outlasts_restarts
from codistill_deploy.errors import CommandError
from codistill_deploy.launch.ray.task import ActorNode, ServerAddress, Task
from codistill_deploy.supervise.isolation import isolated
from codistill_deploy.supervise.process import Launch, Process
from codistill_deploy.supervise.restart_policy import Ending

__all__ = ["ADVERTISE_VARIABLE", "ProcessActor"]

ADVERTISE_VARIABLE = "CODISTILL_ADVERTISE"
"""Set on a node, the host by which the others reach it."""

_POLL_SECONDS = 0.05
_ORPHAN_SECONDS = 0.5
_SHARED_SECONDS = 15.0  # a network file system may show a new file late
_PREDECESSOR_SECONDS = 90.0  # a node that was lost may live on, and a file server keeps a lost node's locks for a while


class ProcessActor:
    """Runs one process, once.

    Args:
        address: the node's host address; None asks Ray for it.
    """

    def __init__(self, address: str | None = None) -> None:
        self._given_address = address
        if address is None:
            _end_with_raylet()
        self._guard = threading.Lock()
        self._process: Process | None = None
        self._asked_to_end = False

    def node(self) -> ActorNode:
        """Return the node that this actor runs on."""
        import ray

        return ActorNode(ray.get_runtime_context().get_node_id(), self._address())

    def run(self, task: Task) -> Ending:
        """Run a process to its end, and return how it ended; a task that cannot be started ends as if it had failed."""
        began = time.monotonic()
        try:
            self._check_shared(task)
            with locked(task.lock, _PREDECESSOR_SECONDS) as lock:
                return self._run_process(task, lock.fileno(), began)
        except CommandError as error:
            return Ending(error.code, str(error), time.monotonic() - began)
        except TimeoutError:
            line = f"{task.lock} is held by a predecessor, on a node that was lost perhaps; end it, and start the run again"
            return Ending(ExitCode.ERROR, line, time.monotonic() - began)
        except OSError as error:
            line = f"{task.folder} cannot be used on node {self._address()}: {explain(error, task.folder)}"
            code = ExitCode.STORAGE if outlasts_restarts(error) else ExitCode.ERROR
            return Ending(code, line, time.monotonic() - began)

    def send_signal(self, number: int) -> None:
        """Send the process a signal; one that has not started will not."""
        with self._guard:
            self._asked_to_end = True
            if self._process is not None:
                self._process.send_signal(signal.Signals(number))

    def _run_process(self, task: Task, lock: int, began: float) -> Ending:
        arguments = [sys.executable, *task.arguments]
        if task.server_address is not None:
            arguments += _advertised(task.server_address).arguments(self._address())
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
                return process.ending(time.monotonic() - began)
            finally:
                process.close()
        finally:
            os.close(writing)
            os.close(reading)

    def _check_shared(self, task: Task) -> None:
        """Check that this node sees the run's folder as the driver does."""
        deadline = time.monotonic() + _SHARED_SECONDS
        while _read(RunLayout(task.folder).driver_file) != task.marker:
            if time.monotonic() >= deadline:
                raise CommandError(
                    f"run folder {task.folder} is not shared: node {self._address()} ({socket.gethostname()}) does not see there "
                    "what the driver wrote; give a --run-dir on storage that every node mounts at the same path"
                )
            time.sleep(_POLL_SECONDS)

    def _address(self) -> str:
        if self._given_address is not None:
            return self._given_address
        import ray

        own_id = ray.get_runtime_context().get_node_id()
        return next(str(node["NodeManagerAddress"]) for node in ray.nodes() if node["NodeID"] == own_id)


def _end_with_raylet() -> None:
    """End this actor when its node's Ray, its parent process, has died.

    Ray counts the actor as dead then, and yet lets it live for as long as a call of it runs. Its process follows it.
    """
    raylet = os.getppid()

    def wait() -> None:
        while os.getppid() == raylet:
            time.sleep(_ORPHAN_SECONDS)
        os._exit(ExitCode.INTERRUPTED)

    threading.Thread(target=wait, name="codistill-raylet", daemon=True).start()


def _advertised(address: ServerAddress) -> ServerAddress:
    """Return the server's address with the host that this node's environment advertises, unless the command gave one."""
    host = os.environ.get(ADVERTISE_VARIABLE)
    return replace(address, advertise=host) if address.advertise is None and host else address


def _environment(task: Task) -> dict[str, str]:
    # In a job, Ray puts the folder of the job's files first.
    here = Path.cwd()
    folder = here / task.search_path
    return isolated({**os.environ, **task.environment}, [folder], last=[folder, here])


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None
