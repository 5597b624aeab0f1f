"""`codistill serve`: one aggregation server."""

from __future__ import annotations

import logging
import os
import threading
from typing import Annotated

import typer

from codistill.config.experiment import load
from codistill_deploy.cli.options import (
    DEFAULT_SERVER,
    ExperimentArgument,
    InsecureOption,
    LastingDirOption,
    SecurityFiles,
    with_security_options,
)
from codistill_deploy.cli.process_setup import find_modules_beside
from codistill_deploy.run_folder import RunFolder
from codistill_deploy.supervise.heartbeat import start_heartbeat
from codistill_deploy.supervise.parent_death import exit_with_parent

__all__ = ["serve"]

# With it, prometheus-client keeps its metrics in files of that folder, for servers of several processes. This one has one.
_OF_OTHER_SERVERS = ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir")

_log = logging.getLogger("codistill")


@with_security_options
def serve(
    experiment: ExperimentArgument,
    *,
    listen: Annotated[str, typer.Option(help="HOST:PORT to listen on.")] = DEFAULT_SERVER,
    run_dir: LastingDirOption = None,
    metrics: Annotated[
        str | None, typer.Option(help="HOST:PORT of the live page and the Prometheus metrics; none by default.")
    ] = None,
    insecure: InsecureOption = False,
    reflection: Annotated[bool, typer.Option("--reflection", help="Serve gRPC reflection.")] = False,
    stay: Annotated[bool, typer.Option("--stay", help="Keep serving after the run is complete.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Write the report once the run is complete.")] = False,
    advertise: Annotated[
        str | None, typer.Option(help="The host by which others reach the server; it is written into the run's folder.")
    ] = None,
    security_files: SecurityFiles,
) -> None:
    """Run one aggregation server. It resumes from the journal in the run's folder, if any."""
    stop = threading.Event()
    supervised = exit_with_parent(stop)
    loaded = load(experiment)
    for variable in _OF_OTHER_SERVERS:
        os.environ.pop(variable, None)
    from codistill_deploy.compare.generations import require_single_run
    from codistill_server.app import ServeOptions, check
    from codistill_server.app import serve as run_server

    start_heartbeat()  # the imports above may hold up every thread, for long on a distant disk
    require_single_run(loaded)
    find_modules_beside(experiment)
    folder = RunFolder(run_dir) if run_dir is not None else RunFolder.lasting(loaded.name)
    security = security_files.read()

    def write_report() -> None:
        from codistill_deploy import report as reports

        _log.info("report: %s", reports.write(folder.path))

    options = ServeOptions(
        listen,
        folder.path,
        metrics,
        insecure,
        reflection,
        stay,
        security,
        on_complete=write_report if report else None,
        advertise=advertise,
    )
    check(options)
    folder.join(loaded, supervised=supervised)
    raise typer.Exit(run_server(loaded, options, stop))
