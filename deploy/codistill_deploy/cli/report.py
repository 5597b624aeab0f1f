"""`codistill report`: the report of a run or a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from codistill_deploy.cli.options import whole_path
from codistill_deploy.cli.stdio import console

__all__ = ["report"]


def report(
    run_dir: Annotated[
        Path, typer.Argument(metavar="RUN_DIR", parser=whole_path, help="The folder of a run or a comparison.")
    ],
) -> None:
    """Write a run's report: one HTML page that needs no network."""
    from codistill_deploy import report as reports

    console.print(f"report: {reports.write(run_dir)}", soft_wrap=True)
