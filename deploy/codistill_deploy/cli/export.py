"""`codistill export`: a student's weights for plain PyTorch."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from codistill.process import modules_beside
from codistill_deploy.cli.options import whole_path
from codistill_deploy.cli.stdio import console
from codistill_deploy.run_folder import RunFolder

__all__ = ["export"]


class Which(StrEnum):
    """Which weights to export."""

    last = "last"
    best = "best"


def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", parser=whole_path, help="The run's folder.")],
    student: Annotated[str, typer.Option(help="The student whose weights are written.")],
    out: Annotated[Path, typer.Option(parser=whole_path, help="The folder to write to.")] = Path("exported"),
    which: Annotated[
        Which, typer.Option(help="The weights after the last step, or those with the best test accuracy.")
    ] = Which.last,
) -> None:
    """Write a student's weights for plain PyTorch."""
    from codistill_deploy.export import export as write

    folder = RunFolder(run_dir)
    modules_beside.add_folder(Path.cwd())  # the run's folder does not say where the experiment's was
    written = write(folder, student, out.absolute(), which.value)
    console.print(f"weights: {written.weights}", soft_wrap=True)
    console.print(f"program: {written.program}", soft_wrap=True)
    console.print(f"about:   {written.about}", soft_wrap=True)
