"""A run on this machine: the server and one worker process per student and teacher, kept alive and ended together."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from codistill.config.experiment import Experiment
from codistill.process.exit_codes import ExitCode
from codistill.process.gpus import gpu_environment, spread
from codistill.rundir.files import write_atomically
from codistill.rundir.storage import unwritable
from codistill.wire.security import Security
from codistill.wire.token import Token
from codistill_deploy.console.progress import ProgressView
from codistill_deploy.errors import CommandError
from codistill_deploy.run_folder import RunFolder
from codistill_deploy.supervise.child import Child
from codistill_deploy.supervise.isolation import isolated
from codistill_deploy.supervise.port import Port
from codistill_deploy.supervise.process import Launch, Process
from codistill_deploy.supervise.restart_policy import DEFAULT_RESTARTS
from codistill_deploy.supervise.spec import ProcessSpec, serve_arguments, work_arguments, worker_specs
from codistill_deploy.supervise.supervisor import Supervisor
from codistill_worker.training.gpus import visible_gpus

__all__ = ["LocalOptions", "run_local"]


@dataclass(frozen=True)
class LocalOptions:
    """How a local run is run.

    Attributes:
        listen: the server's "HOST:PORT"; port 0 takes a free one.
        metrics: the "HOST:PORT" of the live page and the metrics.
        announce: note the addresses once the server is up.
        search_path: a folder in which `package.module:callable` is looked for, behind the usual ones.
        working_folder: in which the processes start; None for this one's.
        restarts: how often each process is restarted; see :mod:`codistill_deploy.supervise.restart_policy`.
        inherited: descriptors that every process inherits: the lock on the run's folder.
        security: TLS and token; where neither keeps others out, a token is made for this run.
        insecure: listen beyond this machine although nothing protects the port.
    """

    listen: str = "127.0.0.1:0"
    metrics: str = "127.0.0.1:0"
    announce: bool = False
    search_path: Path | None = None
    working_folder: Path | None = None
    restarts: int = DEFAULT_RESTARTS
    inherited: tuple[int, ...] = ()
    security: Security = field(default_factory=Security)
    insecure: bool = False


def run_local(
    experiment: Experiment,
    folder: RunFolder,
    view: ProgressView,
    stop: threading.Event,
    options: LocalOptions | None = None,
) -> ExitCode:
    """Run an experiment with processes on this machine, and leave none of them behind.

    Args:
        experiment: what to run.
        folder: the run's folder, started; a run that it holds is resumed.
        view: where progress is shown.
        stop: set to stop: the students are saved first. The caller may set it from a signal handler.
        options: addresses, restarts, protection.

    Returns:
        OK, or INTERRUPTED if it was stopped.

    Raises:
        CommandError: a process ended that the run needs; the text holds its own last line.
    """
    options = options or LocalOptions()
    with _with_token(options, folder) as security:
        return _run(experiment, folder, view, stop, replace(options, security=security))


@contextlib.contextmanager
def _with_token(options: LocalOptions, folder: RunFolder) -> Generator[Security, None, None]:
    """Add a token of its own to a run that nothing else protects, as other users of the machine reach loopback too.

    Its file is in the run's folder, where the processes and `codistill status` find it. It is removed at the end.
    """
    security = options.security
    mutual_tls = security.serves_tls and security.ca is not None
    if security.token is not None or mutual_tls or options.insecure:
        yield security
        return
    token = Token(secrets.token_hex(32), "the token of this run")
    try:
        write_atomically(folder.token_file, token.plain + "\n", private=True)
    except OSError as error:
        raise CommandError(*unwritable(folder.path, error)) from error
    try:
        yield replace(security, token=token, token_file=folder.token_file)
    finally:
        with contextlib.suppress(OSError):
            folder.token_file.unlink(missing_ok=True)


def _run(
    experiment: Experiment, folder: RunFolder, view: ProgressView, stop: threading.Event, options: LocalOptions
) -> ExitCode:
    listen, metrics = Port(options.listen, "listen"), Port(options.metrics, "metrics")
    reading, writing = os.pipe()
    try:
        launch = Launch(_environment(options), reading, options.inherited, options.working_folder)
        resume_command = f"codistill run … --run-dir {folder.path} --resume"
        supervisor = Supervisor(experiment, folder, view, options.security, resume_command=resume_command)
        server = _server(folder, options, launch, listen.address, metrics.address, experiment.training.hang_after)
        gpus = visible_gpus()
        workers = [
            _worker(spec, folder, options, _with_gpu(launch, gpus, number))
            for spec, number in zip(
                worker_specs(experiment, folder), spread(experiment.devices, len(gpus)), strict=True
            )
        ]
        return supervisor.run(server, workers, stop, announce=options.announce)
    finally:
        os.close(writing)
        os.close(reading)
        listen.close()
        metrics.close()


def _environment(options: LocalOptions) -> dict[str, str]:
    folders = [] if options.search_path is None else [options.search_path.resolve()]
    return isolated({**os.environ, **options.security.environment}, folders)


def _with_gpu(launch: Launch, gpus: Sequence[str], number: int | None) -> Launch:
    """Show a worker its own GPU alone, so that it cannot take another's, nor keep a context there."""
    return replace(launch, environment={**launch.environment, **gpu_environment(gpus, number)})


def _server(
    folder: RunFolder, options: LocalOptions, launch: Launch, listen: str, metrics: str, hang_after: float
) -> Child:
    arguments = [*serve_arguments(folder), "--listen", listen, "--metrics", metrics]
    arguments += ["--insecure"] if options.insecure else []
    log = folder.server_log
    start_process = partial(Process, [sys.executable, *arguments], log, launch, hang_after)
    return Child(
        "the server", "", start_process, log, options.restarts, finishes=False, serves=folder.address_file.exists
    )


def _worker(spec: ProcessSpec, folder: RunFolder, options: LocalOptions, launch: Launch) -> Child:
    command = [sys.executable, *work_arguments(folder, spec.participant)]
    start_process = partial(Process, command, spec.log, launch, spec.hang_after)
    return Child(spec.title, spec.participant, start_process, spec.log, options.restarts)
