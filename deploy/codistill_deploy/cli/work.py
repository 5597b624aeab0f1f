"""`codistill work`: one student's worker, or one teacher's."""

from __future__ import annotations

import threading
from typing import Annotated

import typer

from codistill_deploy.cli.options import ExperimentArgument, LastingDirOption, SecurityFiles, with_security_options
from codistill_deploy.cli.process_setup import find_modules_beside, load_with_absolute_paths
from codistill_deploy.errors import CommandError
from codistill_deploy.run_folder import RunFolder
from codistill_deploy.supervise.heartbeat import start_heartbeat
from codistill_deploy.supervise.parent_death import exit_with_parent

__all__ = ["work"]


@with_security_options
def work(
    experiment: ExperimentArgument,
    *,
    student: Annotated[str, typer.Option(help="The student to train, or the teacher to run.")],
    server: Annotated[
        str | None, typer.Option(help="The server's HOST:PORT; by default that of the server in --run-dir.")
    ] = None,
    run_dir: LastingDirOption = None,
    security_files: SecurityFiles,
) -> None:
    """Train one student, or run one teacher, against an aggregation server.

    A student resumes from the checkpoint in the run's folder, if any.
    """
    stop = threading.Event()
    supervised = exit_with_parent(stop)
    loaded = load_with_absolute_paths(experiment)
    from codistill_deploy.compare.generations import require_single_run
    from codistill_worker.app import WorkOptions, check_participant
    from codistill_worker.app import work as run_worker

    start_heartbeat()  # the imports above may hold up every thread, for long on a distant disk
    require_single_run(loaded)
    find_modules_beside(experiment)
    if server is None and run_dir is None:
        raise CommandError("--server: give the server's HOST:PORT, or the --run-dir of a server on this machine")
    check_participant(loaded, student)
    folder = RunFolder(run_dir) if run_dir is not None else RunFolder.lasting(loaded.name)
    security = security_files.read(folder.path if server is None else None)
    folder.join(loaded, [student] if student in loaded.names else [], supervised=supervised)
    options = WorkOptions(student, server or "", folder.path, security)
    if server is None:
        from codistill.rundir.address import read_addresses
        from codistill_deploy.supervise.discovery import find_server

        def current_address() -> str | None:
            addresses = read_addresses(folder.address_file)
            return None if addresses is None else addresses.server

        first_address = find_server(folder.path, loaded.exchange.connect_timeout, stop)
        options = WorkOptions(student, first_address, folder.path, security, current_address)
    raise typer.Exit(run_worker(loaded, options, stop))
