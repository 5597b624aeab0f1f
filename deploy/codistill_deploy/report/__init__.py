"""The report of a run or a comparison: one HTML file that shows what happened.

It is the page that a server shows while a run goes on, :mod:`codistill_server.observability.dashboard`, with the document
inside. The document of a comparison is made here, as no server knows of comparisons.
"""

from __future__ import annotations

from pathlib import Path

from codistill.config.experiment import ExperimentError
from codistill.rundir import history
from codistill.rundir.files import write_atomically
from codistill.rundir.layout import ComparisonLayout, RunLayout
from codistill.rundir.storage import detail
from codistill_deploy.compare import statistics
from codistill_deploy.compare.index import ComparisonIndex
from codistill_deploy.errors import CommandError
from codistill_deploy.report.document import comparison_document
from codistill_deploy.report.figure import gain_svg
from codistill_server.observability.dashboard.document import run_document
from codistill_server.observability.dashboard.html import render

__all__ = ["ReportError", "comparison_document", "gain_svg", "write"]


class ReportError(CommandError):
    """No report can be made of a folder; the message says why and what to do."""


def write(folder: Path) -> Path:
    """Write ``report.html`` into the folder of a run or a comparison, and return its path.

    The report of a comparison links to those of its runs, so they are written too. Its picture of gains is also written
    alone, as ``gains.svg``.

    Raises:
        ReportError: the folder is neither a run's nor a comparison's, or what it holds cannot be read.
    """
    try:
        if ComparisonIndex.path(folder).is_file():
            return _write_comparison(folder)
        if RunLayout(folder).experiment_file.is_file():
            return _save(folder, run_document(history.read(folder)))
    except ExperimentError as error:
        raise ReportError(str(error)) from error
    except OSError as error:
        raise ReportError(f"{folder}: no report can be made: {error}{detail(error, folder)}") from error
    except ValueError as error:
        raise ReportError(f"{folder}: no report can be made: {error}") from error
    raise ReportError(
        f"{folder}: is neither a run folder (no experiment.yaml in it) nor a comparison folder (no comparison.json in it); "
        "give the folder that `codistill run` or `codistill compare` wrote"
    )


def _write_comparison(folder: Path) -> Path:
    index = ComparisonIndex.read(folder)
    runs = statistics.read_runs(folder, index)
    for run in runs:
        if run.history is not None:
            _save(folder / run.path, run_document(run.history))
    document = comparison_document(statistics.summarise(runs, index.left_out), index.experiment)
    if document["pictures"]:
        write_atomically(ComparisonLayout(folder).picture_file, document["pictures"]["wide"])
    return _save(folder, document)


def _save(folder: Path, document: dict[str, object]) -> Path:
    path = RunLayout(folder).report_file
    write_atomically(path, render(document))
    return path
