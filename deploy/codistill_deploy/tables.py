"""The comparison's table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from codistill_deploy.comparison import Comparison, ComparisonIndex, Result, Spread, read_runs, summarise

__all__ = ["comparison_table"]


def comparison_table(folder: Path) -> RenderableType:
    """Returns the table of a comparison: student, parameters, alone, together, gain.

    Raises:
        OSError: the folder holds no comparison.
        ValueError: its index is damaged.
    """
    index = ComparisonIndex.read(folder)
    return _table(summarise(read_runs(folder, index)))


def _table(comparison: Comparison) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    table.add_column("student")
    table.add_column("parameters", justify="right")
    if comparison.baseline is not None:
        table.add_column("alone", justify="right")
    for method in comparison.others:
        table.add_column(method, justify="right")
        if comparison.baseline is not None:
            table.add_column("gain", justify="right")
    rows = [(each.name, each.parameters, each.results) for each in comparison.students]
    for name, parameters, results in rows:
        cells = _cells(comparison, results)
        table.add_row(Text(name, style="bold"), f"{parameters:,}" if parameters else "–", *cells)
    if len(rows) > 1:
        table.add_row(Text("mean", style="italic"), "", *_cells(comparison, comparison.means))
    parts: list[RenderableType] = [table]
    count = len(comparison.seeds)
    spread = f"mean ± standard deviation over {count} seeds" if count > 1 else "one seed"
    parts.append(Text(f"test accuracy after the last epoch, {spread}; gain in percentage points", style="dim"))
    parts += [
        Text(f"not complete: {each.method}, seed {each.seed}: {each.reason}", style="yellow")
        for each in comparison.incomplete
    ]
    return Group(*parts)


def _cells(comparison: Comparison, by_method: Mapping[str, Result]) -> list[Text]:
    cells: list[Text] = []
    if comparison.baseline is not None:
        cells.append(_percent(by_method[comparison.baseline].accuracy))
    for method in comparison.others:
        cells.append(_percent(by_method[method].accuracy))
        if comparison.baseline is not None:
            cells.append(_points(by_method[method].gain))
    return cells


def _percent(spread: Spread) -> Text:
    if spread.mean is None:
        return Text("–")
    deviation = f" ± {100 * spread.deviation:.2f}" if spread.deviation is not None else ""
    return Text(f"{100 * spread.mean:.2f} %{deviation}")


def _points(spread: Spread | None) -> Text:
    if spread is None or spread.mean is None:
        return Text("–")
    deviation = f" ± {100 * spread.deviation:.2f}" if spread.deviation is not None else ""
    return Text(f"{100 * spread.mean:+.2f}{deviation}", style="green" if spread.mean > 0 else "red")
