"""The table of a comparison for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from codistill_deploy.compare.index import ComparisonIndex
from codistill_deploy.compare.statistics import Comparison, Result, Spread, read_runs, summarise
from codistill_deploy.console.literal import literal

__all__ = ["comparison_table"]


def comparison_table(folder: Path, console: Console) -> RenderableType:
    """Return the table of a comparison: accuracy alone and together, and the gain.

    It has a row for each student where the methods have room beside each other, else a row for each method.

    Args:
        folder: the comparison's folder.
        console: where the table will be shown; its width decides the form.

    Raises:
        OSError: the folder holds no comparison.
        ValueError: its index is damaged.
    """
    index = ComparisonIndex.read(folder)
    comparison = summarise(read_runs(folder, index), index.left_out)
    count = len(comparison.seeds)
    spread = f"mean ± standard deviation over {count} seeds" if count > 1 else "one seed"
    caption = f"test accuracy after the last epoch, {spread}; gain in percentage points"
    table = _by_student(comparison)
    unbounded = console.options.update(max_width=10_000)  # else it is measured as what it would be squeezed to
    if console.measure(table, options=unbounded).maximum > console.width:
        table = _by_method(comparison)
        caption = f"test accuracy after the last epoch, {spread}: in %"
        if comparison.baseline is not None:
            caption += f" of {comparison.baseline}, of the others the gain in percentage points"
    return Group(
        table,
        literal(caption, style="dim"),
        *(literal(f"not compared: {method}: {reason}", style="dim") for method, reason in comparison.left_out.items()),
        *(
            literal(f"not complete: {run.method}, seed {run.seed}: {run.reason}", style="yellow")
            for run in comparison.incomplete
        ),
    )


def _by_student(comparison: Comparison) -> Table:
    table = _empty_table()
    table.add_column("student")
    table.add_column("parameters", justify="right")
    if comparison.baseline is not None:
        table.add_column("alone", justify="right")
    for method in comparison.others:
        table.add_column(literal(method), justify="right")
        if comparison.baseline is not None:
            table.add_column("gain", justify="right")
    for student in comparison.students:
        parameters = f"{student.parameters:,}" if student.parameters else "–"
        table.add_row(literal(student.name, style="bold"), parameters, *_cells(comparison, student.results))
    if len(comparison.students) > 1:
        table.add_row(literal("mean", style="italic"), "", *_cells(comparison, comparison.means))
    return table


def _by_method(comparison: Comparison) -> Table:
    """Show accuracy alone in percent, then the gain with each method: narrow enough for a terminal."""
    columns = [(student.name, student.results) for student in comparison.students]
    if len(columns) > 1:
        columns.append(("mean", comparison.means))
    table = _empty_table(padding=2)
    table.add_column("method", no_wrap=True)
    for name, _ in columns:
        table.add_column(literal(name), justify="right")
    for method in comparison.methods:
        cells = [
            _percent(results[method].accuracy, unit="")
            if comparison.baseline in (None, method)
            else _points(results[method].gain)
            for _, results in columns
        ]
        table.add_row(literal(method, style="bold"), *cells)
    return table


def _empty_table(padding: int = 3) -> Table:
    return Table(box=None, pad_edge=False, header_style="bold", padding=(0, padding, 0, 0))


def _cells(comparison: Comparison, results: Mapping[str, Result]) -> list[Text]:
    cells: list[Text] = []
    if comparison.baseline is not None:
        cells.append(_percent(results[comparison.baseline].accuracy))
    for method in comparison.others:
        cells.append(_percent(results[method].accuracy))
        if comparison.baseline is not None:
            cells.append(_points(results[method].gain))
    return cells


def _percent(spread: Spread, unit: str = " %") -> Text:
    if spread.mean is None:
        return literal("–")
    deviation = f" ± {100 * spread.deviation:.2f}" if spread.deviation is not None else ""
    return literal(f"{100 * spread.mean:.2f}{unit}{deviation}")


def _points(spread: Spread | None) -> Text:
    if spread is None or spread.mean is None:
        return literal("–")
    deviation = f" ± {100 * spread.deviation:.2f}" if spread.deviation is not None else ""
    return literal(f"{100 * spread.mean:+.2f}{deviation}", style="green" if spread.mean > 0 else "red")
