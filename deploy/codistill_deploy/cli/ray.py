"""`codistill ray`: an experiment on a Ray cluster."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from codistill.config.experiment import load
from codistill.process.exit_codes import ExitCode
from codistill_deploy.cli.console_run import read_security_for_both, run_in_folder
from codistill_deploy.cli.options import ExperimentArgument, SecurityFiles, whole_path, with_security_options
from codistill_deploy.cli.process_setup import find_modules_beside, stop_on_signals
from codistill_deploy.cli.stdio import console, tolerate_lost_stdout
from codistill_deploy.errors import CommandError
from codistill_deploy.run_folder import RunFolder
from codistill_deploy.supervise.restart_policy import DEFAULT_RESTARTS

if TYPE_CHECKING:
    from codistill_deploy.console.progress import ProgressView

__all__ = ["ray"]


@with_security_options
def ray(
    experiment: ExperimentArgument,
    *,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            "--run-dir",
            parser=whole_path,
            help="The run's folder, on storage that all nodes share; without a cluster, runs/NAME-TIME.",
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="The cluster's HOST:PORT, or auto; else RAY_ADDRESS; else start a new Ray on this machine."),
    ] = None,
    advertise: Annotated[
        str | None,
        typer.Option(
            help="The host by which nodes reach the server; else CODISTILL_ADVERTISE on its node; else its IP."
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="The server's port; 0 takes a free one.")] = 0,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="The port of the Prometheus metrics; by default one on the node's loopback."
        ),
    ] = None,
    wait_for_resources: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for missing CPUs and GPUs.")
    ] = 600.0,
    gpus_per_student: Annotated[
        float | None,
        typer.Option(min=0.01, max=1, help="GPUs of each student that uses one; below 1, students share a GPU."),
    ] = None,
    security_files: SecurityFiles,
    restarts: Annotated[
        int, typer.Option(min=0, max=1_000_000, help="How often each actor that dies is started again.")
    ] = DEFAULT_RESTARTS,
) -> None:
    """Run an experiment on a Ray cluster, or continue the run that the folder holds.

    Starts actors for a server and one worker per student, each with its CPUs and GPUs. Writes a report at the end.
    """
    loaded = load(experiment)
    from codistill_deploy.compare import generations
    from codistill_deploy.launch.preflight import check
    from codistill_deploy.launch.ray.driver import RayOptions, run_on_ray
    from codistill_deploy.launch.ray.plan import check_devices
    from codistill_deploy.launch.ray.task import ServerAddress

    if run_dir is None and (address or os.environ.get("RAY_ADDRESS")):
        raise CommandError("--run-dir: on a cluster the run's folder must be on storage that all nodes share; name it")
    folder = RunFolder(run_dir) if run_dir is not None else RunFolder.default(loaded.name)
    tolerate_lost_stdout()
    stop = stop_on_signals()
    options = RayOptions(
        address,
        ServerAddress(port, metrics_port, advertise),
        restarts,
        wait_for_resources,
        gpus_per_student,
        experiment.parent,
        read_security_for_both(security_files),
    )
    generations.require_single_run(loaded)
    find_modules_beside(experiment)
    check(loaded, str(experiment), here=False)
    check_devices(loaded, str(experiment))
    resume = folder.holds_run
    folder.check(loaded, resume=resume)

    def run(view: ProgressView, lock: int) -> ExitCode:
        del lock  # an actor holds its own, as no descriptor goes from machine to machine
        return run_on_ray(loaded, folder, view, stop, options)

    code = run_in_folder(loaded, folder, loaded.name, run, mode="grpc", resume=resume, report=True)
    if code is ExitCode.INTERRUPTED:
        command = shlex.join(["codistill", "ray", str(experiment), "--run-dir", str(folder.path)])
        console.print(f"stopped; continue with: {command}", soft_wrap=True)
    raise typer.Exit(code)
