"""The driver: places the actors of a run, keeps them alive, and leaves none behind."""

from __future__ import annotations

import contextlib
import json
import secrets
import signal
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
from codistill_deploy.console.progress import View
from codistill_deploy.errors import CommandError
from codistill_deploy.launch.ray.actor import Placement, ProcessActor, Serving, Task
from codistill_deploy.launch.ray.connection import connected
from codistill_deploy.launch.ray.plan import Bundle, bundles, shortage
from codistill_deploy.run_folder import RunFolder
from codistill_deploy.supervise import spec
from codistill_deploy.supervise.child import Child
from codistill_deploy.supervise.restart_policy import DEFAULT_RESTARTS, Ending
from codistill_deploy.supervise.supervisor import Supervisor

__all__ = ["DEFAULT_WAIT", "RayOptions", "run_on_ray"]

DEFAULT_WAIT = 600.0
"""Seconds that a run waits for what it asks of a cluster."""

_PLACE_POLL_SECONDS = 0.2
_PROGRESS_SECONDS = 15.0
_FIRST_PROGRESS_SECONDS = 1.0  # a cluster that has room gives it by then
_STARTING_SECONDS = 15.0  # an actor that has its place takes some seconds to come up
_CALL_SECONDS = 5.0


@dataclass(frozen=True)
class RayOptions:
    """How a run on Ray is run.

    Attributes:
        address: the cluster's; see :func:`codistill_deploy.launch.ray.connection.connected`.
        serving: where the server listens.
        restarts: how often each actor is made anew; see :mod:`codistill_deploy.supervise.restart_policy`.
        wait: seconds to wait for resources that are not there, or free.
        gpus_per_student: see :func:`codistill_deploy.launch.ray.plan.bundles`.
        search_path: a folder with the user's own modules.
        security: TLS and token; without a token one is made for this run.
    """

    address: str | None = None
    serving: Serving = field(default_factory=Serving)
    restarts: int = DEFAULT_RESTARTS
    wait: float = DEFAULT_WAIT
    gpus_per_student: float | None = None
    search_path: Path = Path()
    security: Security = field(default_factory=Security)


def run_on_ray(
    experiment: Experiment, folder: RunFolder, view: View, stop: threading.Event, options: RayOptions
) -> ExitCode:
    """Runs an experiment in actors of a Ray cluster, and leaves none of them behind.

    Args:
        experiment: what to run.
        folder: the run's folder, on storage that all nodes share, started; a run that it holds is gone on with.
        view: where progress is shown.
        stop: set to stop: the students are saved first.
        options: the cluster, and how to run there.

    Returns:
        OK, or INTERRUPTED if it was stopped.

    Raises:
        CommandError: the cluster cannot be reached or lacks what is asked for, or a part ended that the run needs.
    """
    needed = sum(bundle.cpus for bundle in bundles(experiment, 0))
    with connected(options.address, needed) as ray:
        return _Run(ray, experiment, folder, view, options).run(stop)


class _Run:
    def __init__(self, ray: Any, experiment: Experiment, folder: RunFolder, view: View, options: RayOptions) -> None:
        self._ray = ray
        self._experiment = experiment
        self._folder = folder
        self._view = view
        self._options = options
        token = options.security.token or Token(secrets.token_hex(32), "the token of this run")
        self._security = replace(options.security, token=token)
        self._marker = json.dumps({"host": socket.gethostname(), "run": secrets.token_hex(16)})
        self._bundles = bundles(experiment, ray.cluster_resources().get("GPU", 0.0), options.gpus_per_student)
        self._lives: dict[int, _Life] = {}
        self._told = 0.0

    def run(self, stop: threading.Event) -> ExitCode:
        """Places the actors, and runs them."""
        if self._experiment.exchange.journal.durability == "process" and len(self._nodes()) > 1:
            self._view.note(
                "exchange.journal.durability is process: a node that is lost may take the last rounds along, and the run could "
                "not go on; set it to power"
            )
        write_atomically(self._folder.driver_file, self._marker)
        try:
            group = self._place(stop)
            if group is None:
                return ExitCode.INTERRUPTED
            try:
                return self._run(group, stop)
            finally:
                self._ray.util.remove_placement_group(group)
        finally:
            with contextlib.suppress(OSError):
                (self._folder.driver_file).unlink(missing_ok=True)

    def _place(self, stop: threading.Event) -> Any:
        """Returns the placement group once all of it has its place; None if asked to stop before."""
        group = self._ray.util.placement_group([bundle.resources for bundle in self._bundles], strategy="PACK")
        begun = time.monotonic()
        self._told = begun + _FIRST_PROGRESS_SECONDS - _PROGRESS_SECONDS
        placed = False
        try:
            while not stop.is_set():
                placed = group.wait(0)  # Ray takes whole seconds only, too long for one who stops the run
                if placed:
                    return group
                self._wait_for(self._bundles, (), time.monotonic() - begun)
                stop.wait(_PLACE_POLL_SECONDS)
            return None
        finally:
            if not placed:
                self._ray.util.remove_placement_group(group)

    def _wait_for(self, asked: Sequence[Bundle], placed: Sequence[Bundle], waited: float) -> None:
        """Says now and then what is waited for.

        Raises:
            CommandError: it has been waited for long enough.
        """
        lacks = shortage(asked, self._nodes(), self._ray.available_resources(), placed)
        if waited >= self._options.wait:
            raise CommandError(
                f"the Ray cluster lacks resources: {lacks}; waited {waited:.0f} s; add nodes, free some, set training.device: "
                "cpu, give --gpus-per-student less than 1, or wait longer with --wait-for-resources",
                ExitCode.NO_RESOURCES,
            )
        if time.monotonic() - self._told >= _PROGRESS_SECONDS:
            self._told = time.monotonic()
            self._view.note(f"waiting for the Ray cluster, {self._options.wait - waited:.0f} s left: {lacks}")

    def _nodes(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _run(self, group: Any, stop: threading.Event) -> ExitCode:
        folder = self._folder
        crew = Supervisor(
            self._experiment,
            folder,
            self._view,
            self._security,
            again=f"codistill ray … --run-dir {folder.path}",
            on_poll=self._tend,
        )
        serving = self._options.serving
        hang_after = self._experiment.training.hang_after
        task = self._task(spec.serve_arguments(folder), folder.server_log, hang_after, folder.server_host_lock, serving)
        server = Child("the server", "", self._begin(group, 0, task), task.log, self._options.restarts, ends=False)
        workers: list[Child] = []
        for index, part in enumerate(spec.workers(self._experiment, folder), 1):
            task = self._task(spec.work_arguments(folder, part.name), part.log, part.hang_after, part.host_lock)
            begin = self._begin(group, index, task)
            workers.append(Child(part.title, part.name, begin, task.log, self._options.restarts))
        return crew.run(server, workers, stop, announce=True)

    def _task(
        self, arguments: Sequence[str], log: Path, hang_after: float, lock: Path, serving: Serving | None = None
    ) -> Task:
        options = self._options
        assert self._security.token is not None  # noqa: S101 - one is made where none is given
        # Certificates are files on every node; the token is handed over, so that no node needs its file.
        files = replace(self._security, token_file=None).environment
        environment = {**files, TOKEN_VARIABLE: self._security.token.plain}
        return Task(
            self._folder.path, self._marker, arguments, log, hang_after, lock, environment, options.search_path, serving
        )

    def _begin(self, group: Any, index: int, task: Task) -> Callable[[], _Life]:
        def begin() -> _Life:
            life = self._lives[index] = _Life(self._ray, group, index, self._bundles[index], task)
            return life

        return begin

    def _tend(self) -> None:
        """Says what is waited for by actors that have no place, as after a node was lost."""
        now = time.monotonic()
        waiting = {index: now - life.begun for index, life in self._lives.items() if life.pending}
        longest = max(waiting.values(), default=0.0)
        if longest >= _STARTING_SECONDS:
            asked = [self._bundles[index] for index in waiting]
            placed = [bundle for index, bundle in enumerate(self._bundles) if index not in waiting]
            self._wait_for(asked, placed, longest)


class _Life:
    """One actor, from its making to its end."""

    def __init__(self, ray: Any, group: Any, index: int, bundle: Bundle, task: Task) -> None:
        self.begun = time.monotonic()
        self._ray = ray
        self._ending: Ending | None = None
        self._place: Placement | None = None
        options: dict[str, Any] = {
            "num_cpus": bundle.cpus,
            "num_gpus": bundle.gpus,
            "max_concurrency": 4,  # it is told to end while it runs
            "max_restarts": 0,
            "scheduling_strategy": ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=index
            ),
        }
        if not bundle.gpus:
            # A student that is to train on the CPU must not find a GPU, which `device: auto` would take.
            task = replace(task, environment={**task.environment, "CUDA_VISIBLE_DEVICES": ""})
        self._actor = ray.remote(ProcessActor).options(**options).remote()
        self._where = self._actor.where.remote()
        self._run = self._actor.run.remote(task)

    @property
    def pending(self) -> bool:
        """Whether the actor has not come up yet."""
        return self.code is None and self._came_up_at is None

    @property
    def code(self) -> int | None:
        """See :class:`codistill_deploy.supervise.child.ManagedProcess`."""
        if self._ending is None and self._is_there(self._run):
            self._ending = self._end()
        return None if self._ending is None else self._ending.code

    def ending(self, ran: float) -> Ending:
        """See :class:`codistill_deploy.supervise.child.ManagedProcess`."""
        assert self.code is not None  # noqa: S101 - the caller looked
        assert self._ending is not None  # noqa: S101
        return replace(self._ending, ran=ran)

    def tell(self, number: signal.Signals) -> None:
        """See :class:`codistill_deploy.supervise.child.ManagedProcess`."""
        if self.code is None:
            self._actor.tell.remote(int(number))

    def close(self) -> None:
        """See :class:`codistill_deploy.supervise.child.ManagedProcess`."""
        if self.code is None and self._came_up_at is not None:
            self.tell(signal.SIGKILL)
            self._ray.wait([self._run], timeout=_CALL_SECONDS)
        self._ray.kill(self._actor)

    @property
    def _came_up_at(self) -> Placement | None:
        if self._place is None and self._is_there(self._where):
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._place = self._ray.get(self._where)
        return self._place

    def _is_there(self, answer: Any) -> bool:
        ready, _ = self._ray.wait([answer], timeout=0)
        return bool(ready)

    def _end(self) -> Ending:
        errors = self._ray.exceptions
        try:
            return self._ray.get(self._run)
        except errors.RuntimeEnvSetupError as error:
            return Ending(ExitCode.CONFIGURATION, f"the job's runtime environment cannot be made: {_line(error)}")
        except errors.RayTaskError as error:
            return Ending(ExitCode.ERROR, _line(error))
        except errors.RayError as error:
            return Ending(-signal.SIGKILL, lost=self._lost(error))

    def _lost(self, error: Exception) -> str:
        place = self._came_up_at
        node = "its node" if place is None else f"its node {place.address}"
        if getattr(error, "preempted", False):
            return f"{node} was drained or pre-empted"
        alive = {each["NodeID"] for each in self._ray.nodes() if each["Alive"]}
        if "its node has died" in str(error) or (place is not None and place.node not in alive):
            return f"{node} died"
        return f"its actor on {node.removeprefix('its ')} died"


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
