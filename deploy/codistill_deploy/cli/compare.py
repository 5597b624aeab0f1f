"""`codistill compare`: several methods, each with several seeds, and the table of what each gained."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from codistill.config.experiment import Experiment
from codistill.process.exit_codes import ExitCode
from codistill_deploy.cli.console_run import Wire, read_security_for_both, run_here, write_report
from codistill_deploy.cli.options import (
    ExperimentArgument,
    InProcessOption,
    ResumeOption,
    RunDirOption,
    SecurityFiles,
)
from codistill_deploy.cli.process_setup import find_modules_beside, load_with_absolute_paths, stop_on_signals
from codistill_deploy.cli.stdio import console, tolerate_lost_stdout
from codistill_deploy.errors import CommandError
from codistill_deploy.run_folder import RunFolder

__all__ = ["compare"]


def compare(
    experiment: ExperimentArgument,
    methods: Annotated[
        str, typer.Option(help="Methods, separated by commas: independent, dml, kdcl, kdcl/linear …; or all.")
    ] = ("independent,kdcl"),
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="How many seeds, counted from the experiment's own.")] = 3,
    run_dir: RunDirOption = None,
    resume: ResumeOption = False,
    in_process: InProcessOption = False,
) -> None:
    """Compare methods: how much each student gains.

    Runs every method with every seed, then shows a table and writes a report. If a method needs a teacher and the
    experiment has none, the student that is best alone with the same seed teaches.
    """
    from codistill_deploy.compare.runner import compare as run_comparison
    from codistill_deploy.launch.preflight import check

    loaded, source = load_with_absolute_paths(experiment), experiment.absolute()
    folder = (RunFolder(run_dir) if run_dir else RunFolder.default(f"{loaded.name}-compare")).path
    tolerate_lost_stdout()
    stop = stop_on_signals()
    wire = Wire(None if in_process else read_security_for_both(SecurityFiles()))
    find_modules_beside(experiment)

    def check_variant(variant: Experiment) -> None:
        check(variant, str(experiment))

    def run_variant(variant: Experiment, run_folder: RunFolder, title: str) -> ExitCode:
        resumed = resume and run_folder.holds_run
        return run_here(variant, run_folder, title, source, stop, resumed, in_process, wire)

    chosen = list(dict.fromkeys(part.strip() for part in methods.split(",") if part.strip()))
    if not chosen:
        raise CommandError("--methods: '' names no method; give some, separated by commas: independent,kdcl")
    each_seed = range(loaded.seed, loaded.seed + seeds)
    code = run_comparison(loaded, chosen, each_seed, folder, run_variant, stop, check=check_variant, resume=resume)
    if code is ExitCode.INTERRUPTED:
        options = f"--run-dir {shlex.quote(str(folder))} --resume"
        console.print(f"stopped; continue with the same command and {options}", soft_wrap=True)
        raise typer.Exit(code)
    from codistill_deploy.console.tables import comparison_table

    console.print()
    console.print(comparison_table(folder, console))
    console.print()
    write_report(folder)
    raise typer.Exit(code)
