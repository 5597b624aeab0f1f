"""The driver: places the actors of a run on a Ray cluster, keeps them alive, and leaves none behind."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from codistill.config.experiment import Experiment
from codistill.process.exit_codes import ExitCode
from codistill.rundir.files import write_atomically
from codistill.wire.security import Security
from codistill.wire.security_settings import TOKEN_VARIABLE
from codistill.wire.token import Token
from codistill_deploy.console.progress import ProgressView
from codistill_deploy.launch.ray.actor_process import ActorProcess
from codistill_deploy.launch.ray.connection import connect
from codistill_deploy.launch.ray.placement import Placement
from codistill_deploy.launch.ray.plan import bundles
from codistill_deploy.launch.ray.task import ServerAddress, Task
from codistill_deploy.run_folder import RunFolder
from codistill_deploy.supervise.child import Child
from codistill_deploy.supervise.restart_policy import DEFAULT_RESTARTS
from codistill_deploy.supervise.spec import ProcessSpec, serve_arguments, work_arguments, worker_specs
from codistill_deploy.supervise.supervisor import Supervisor

__all__ = ["DEFAULT_WAIT", "RayOptions", "run_on_ray"]

DEFAULT_WAIT = 600.0
"""Seconds that a run waits for the resources that it asks of a cluster."""


@dataclass(frozen=True)
class RayOptions:
    """How a run on Ray is run.

    Attributes:
        address: the cluster's; see :func:`codistill_deploy.launch.ray.connection.connect`.
        server_address: where the server listens.
        restarts: how often each actor is created anew; see :mod:`codistill_deploy.supervise.restart_policy`.
        wait: seconds to wait for resources that are not there, or not free.
        gpus_per_student: see :func:`codistill_deploy.launch.ray.plan.bundles`.
        search_path: a folder with the user's own modules.
        security: TLS and token; without a token one is made for this run.
    """

    address: str | None = None
    server_address: ServerAddress = field(default_factory=ServerAddress)
    restarts: int = DEFAULT_RESTARTS
    wait: float = DEFAULT_WAIT
    gpus_per_student: float | None = None
    search_path: Path = Path()
    security: Security = field(default_factory=Security)


def run_on_ray(
    experiment: Experiment, folder: RunFolder, view: ProgressView, stop: threading.Event, options: RayOptions
) -> ExitCode:
    """Run an experiment in actors of a Ray cluster, and leave none of them behind.

    Args:
        experiment: what to run.
        folder: the run's folder, on storage that all nodes share, started; a run that it holds is resumed.
        view: where progress is shown.
        stop: set to stop: the students are saved first.
        options: the cluster, and how to run there.

    Returns:
        OK, or INTERRUPTED if it was stopped.

    Raises:
        CommandError: the cluster cannot be reached or lacks resources, or a process ended that the run needs.
    """
    cpus = sum(bundle.cpus for bundle in bundles(experiment, 0))
    with connect(options.address, cpus) as ray:
        return _Driver(ray, experiment, folder, view, options).run(stop)


class _Driver:
    def __init__(
        self, ray: Any, experiment: Experiment, folder: RunFolder, view: ProgressView, options: RayOptions
    ) -> None:
        self._ray = ray
        self._experiment = experiment
        self._folder = folder
        self._view = view
        self._options = options
        token = options.security.token or Token(secrets.token_hex(32), "the token of this run")
        self._security = replace(options.security, token=token)
        self._marker = json.dumps({"host": socket.gethostname(), "run": secrets.token_hex(16)})
        self._bundles = bundles(experiment, ray.cluster_resources().get("GPU", 0.0), options.gpus_per_student)
        self._placement = Placement(ray, self._bundles, view, options.wait)
        self._processes: dict[int, ActorProcess] = {}

    def run(self, stop: threading.Event) -> ExitCode:
        """Place the actors, and run them."""
        if self._experiment.exchange.journal.durability == "process" and self._placement.node_count > 1:
            self._view.note(
                "exchange.journal.durability is process: a lost node may take the last rounds with it, and the run could then "
                "not continue; set it to power"
            )
        write_atomically(self._folder.driver_file, self._marker)
        try:
            group = self._placement.reserve(stop)
            if group is None:
                return ExitCode.INTERRUPTED
            try:
                return self._supervise(group, stop)
            finally:
                self._ray.util.remove_placement_group(group)
        finally:
            with contextlib.suppress(OSError):
                self._folder.driver_file.unlink(missing_ok=True)

    def _supervise(self, group: Any, stop: threading.Event) -> ExitCode:
        supervisor = Supervisor(
            self._experiment,
            self._folder,
            self._view,
            self._security,
            resume_command=f"codistill ray … --run-dir {self._folder.path}",
            on_poll=self._check_pending,
        )
        specs = worker_specs(self._experiment, self._folder)
        workers = [self._worker(group, index, spec) for index, spec in enumerate(specs, 1)]
        return supervisor.run(self._server(group), workers, stop, announce=True)

    def _server(self, group: Any) -> Child:
        folder = self._folder
        hang_after = self._experiment.training.hang_after
        task = self._task(serve_arguments(folder), folder.server_log, hang_after, folder.server_host_lock)
        task = replace(task, server_address=self._options.server_address)
        start_process = self._starter(group, 0, task)
        return Child(
            "the server",
            "",
            start_process,
            task.log,
            self._options.restarts,
            finishes=False,
            serves=folder.address_file.exists,
        )

    def _worker(self, group: Any, index: int, spec: ProcessSpec) -> Child:
        arguments = work_arguments(self._folder, spec.participant)
        task = self._task(arguments, spec.log, spec.hang_after, spec.host_lock)
        start_process = self._starter(group, index, task)
        return Child(spec.title, spec.participant, start_process, task.log, self._options.restarts)

    def _task(self, arguments: Sequence[str], log: Path, hang_after: float, lock: Path) -> Task:
        assert self._security.token is not None  # noqa: S101 - one is made where none is given
        # Certificates are files on every node; the token is handed over, so that no node needs its file.
        files = replace(self._security, token_file=None).environment
        environment = {**files, TOKEN_VARIABLE: self._security.token.plain}
        search_path = self._options.search_path
        return Task(self._folder.path, self._marker, arguments, log, hang_after, lock, environment, search_path)

    def _starter(self, group: Any, index: int, task: Task) -> Callable[[], ActorProcess]:
        def start_process() -> ActorProcess:
            process = ActorProcess(self._ray, group, index, self._bundles[index], task)
            self._processes[index] = process
            return process

        return start_process

    def _check_pending(self) -> None:
        now = time.monotonic()
        pending = {index: now - process.created_at for index, process in self._processes.items() if process.pending}
        self._placement.check_pending(pending)
