"""`codistill run`: an experiment on this machine."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from codistill.process.exit_codes import ExitCode
from codistill_deploy.cli.console_run import Wire, read_security_for_both, run_here
from codistill_deploy.cli.options import (
    ExperimentArgument,
    InProcessOption,
    InsecureOption,
    ResumeOption,
    RunDirOption,
    SecurityFiles,
    with_security_options,
)
from codistill_deploy.cli.process_setup import load_with_absolute_paths, stop_on_signals
from codistill_deploy.cli.stdio import console, tolerate_lost_stdout
from codistill_deploy.run_folder import RunFolder
from codistill_deploy.supervise.restart_policy import DEFAULT_RESTARTS

__all__ = ["run"]


@with_security_options
def run(
    experiment: ExperimentArgument,
    run_dir: RunDirOption = None,
    *,
    resume: ResumeOption = False,
    in_process: InProcessOption = False,
    listen: Annotated[str, typer.Option(help="The server's HOST:PORT; port 0 takes a free one.")] = "127.0.0.1:0",
    metrics: Annotated[
        str, typer.Option(help="HOST:PORT of the live page and the Prometheus metrics.")
    ] = "127.0.0.1:0",
    insecure: InsecureOption = False,
    security_files: SecurityFiles,
    restarts: Annotated[
        int, typer.Option(min=0, max=1_000_000, help="How often each process that dies is started again.")
    ] = DEFAULT_RESTARTS,
) -> None:
    """Run an experiment on this machine.

    Starts a server and one worker process per student, shows a live table, and writes a report at the end.
    """
    loaded, source = load_with_absolute_paths(experiment), experiment.absolute()
    folder = RunFolder(run_dir) if run_dir is not None else RunFolder.default(loaded.name)
    tolerate_lost_stdout()
    stop = stop_on_signals()
    security = None if in_process else read_security_for_both(security_files)
    wire = Wire(security, listen, metrics, announce=True, insecure=insecure)
    from codistill_deploy.compare import generations

    runs = generations.runs_in_order(loaded, folder.path, loaded.name)
    code = ExitCode.OK
    for planned, planned_folder, title in runs:
        if len(runs) > 1 and resume and generations.is_trained(planned_folder):
            console.print(f"{title}: trained already")
            continue
        resumed = resume and (len(runs) == 1 or planned_folder.holds_run)
        code = run_here(planned, planned_folder, title, source, stop, resumed, in_process, wire, restarts, report=True)
        if code is not ExitCode.OK:
            break
    if code is ExitCode.INTERRUPTED:
        command = shlex.join(["codistill", "run", str(experiment), "--run-dir", str(folder.path), "--resume"])
        command += " --in-process" if in_process else ""
        console.print(f"stopped; continue with: {command}", soft_wrap=True)
    raise typer.Exit(code)
