"""The picture of gains: a dot for each mean, a whisker for its spread, a ring for every seed, as one SVG.

It carries its own colours for light and dark, so it stands alone as a file and inside the report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape

from codistill_deploy.compare.statistics import Comparison, Result, Spread
from codistill_server.observability.dashboard import palette

__all__ = ["gain_svg"]

_Scale = Callable[[float], float]
_Axis = tuple[float, float, float]  # its ends, and its step
_Row = tuple[str, Result, str]  # a method, its result, and a colour
_Group = tuple[str, list[_Row]]  # a student, and its rows

_ROW = 26
_TOP = 12
_PANEL = 215
_NARROW = 600
_TITLE = "gain in test accuracy over training alone, percentage points"
_STYLE = (
    f".gains{{{palette.declarations(palette.LIGHT)}--ink:#16202b;--soft:#5b6875;--line:#e2e6ea;--paper:#fff;"
    "font:13px ui-sans-serif,system-ui,'Segoe UI',Helvetica,Arial,sans-serif;font-variant-numeric:tabular-nums}"
    f"@media screen and (prefers-color-scheme:dark){{.gains{{{palette.declarations(palette.DARK)}"
    "--ink:#e6eaee;--soft:#98a4b0;--line:#2b333b;--paper:#14191e}}"
    ".gains text{fill:var(--ink)}.gains .soft{fill:var(--soft);font-size:12px}.gains .name{font-weight:600}"
    ".gains .grid{stroke:var(--line)}.gains .zero{stroke:var(--soft);stroke-width:1.5}.gains .rule{stroke:var(--line)}"
    ".gains .whisker{stroke-width:2;fill:none}.gains .mean{stroke:var(--paper);stroke-width:1.5}"
    ".gains .seed{fill:none;stroke-width:1.4;stroke-opacity:.65}"
)


def gain_svg(comparison: Comparison, width: int = 860) -> str:
    """Draw every student's gain with every method, and the mean over students, in percentage points.

    The mean over seeds is a dot, one sample standard deviation to each side a whisker, each seed a ring. Colours tell
    students apart; where there are a few methods they tell methods apart. Of many methods a wide picture has a panel for
    each student, and a row for each method.

    Args:
        comparison: what to draw; a row without a gain says so.
        width: of the picture in pixels; under 600 the labels are set more closely.

    Returns:
        An SVG document without an XML declaration, every text in it escaped.
    """
    groups = _groups(comparison)
    if comparison.many and width >= _NARROW:
        return _panels(groups, width)
    return _rows(groups, width, several=len(comparison.others) > 1)


def _groups(comparison: Comparison) -> list[_Group]:
    by_method = len(comparison.others) > 1 and not comparison.many

    def group(name: str, results: Mapping[str, Result], colour: str) -> _Group:
        return name, [
            (method, results[method], f"var(--c{column % len(palette.LIGHT)})" if by_method else colour)
            for column, method in enumerate(comparison.others)
        ]

    groups = [
        group(student.name, student.results, f"var(--c{position % len(palette.LIGHT)})")
        for position, student in enumerate(comparison.students)
    ]
    return groups if len(groups) < 2 else [*groups, group("all students, mean", comparison.means, "var(--ink)")]


def _rows(groups: Sequence[_Group], width: int, *, several: bool) -> str:
    """Draw one axis for all: a group of rows for each student, in it a row for each method."""
    narrow = width < _NARROW
    low, high, step = _range([edge for _, rows in groups for edge in _edges(rows)], 4 if narrow else 8)
    heads = several or narrow  # the name has its own line above the rows
    longest = max(
        (len(text) for name, rows in groups for text in ([] if heads else [name]) + [m for m, _, _ in rows if several]),
        default=0,
    )
    left = 14 if narrow and not several else min(26 + 7 * longest, int(width * 0.34))
    right = width - (104 if narrow else 130)
    x = _scale((low, high, step), left, right)
    body: list[str] = []
    y = _TOP
    for position, (name, rows) in enumerate(groups):
        if position:
            body.append(f'<line class="rule" x1="0" x2="{width}" y1="{y}" y2="{y}"/>')
        y += 4
        if heads:
            body.append(f'<text class="name" x="4" y="{y + 17}">{escape(_cut(name, width // 8))}</text>')
            y += _ROW - 4
        for method, result, colour in rows:
            middle = y + _ROW / 2
            if several:
                body.append(
                    f'<text class="soft" x="14" y="{middle + 4:g}">{escape(_cut(method, (left - 18) // 7))}</text>'
                )
            elif not heads:
                body.append(f'<text class="name" x="4" y="{middle + 4:g}">{escape(_cut(name, (left - 8) // 7))}</text>')
            label = f"{name}, {method}"
            body.append(_row(label, _percent(result.gain), colour, x, y=middle, right=width - 4))
            y += _ROW
        y += 4
    grid = _grid((low, high, step), x, _TOP, y)
    title = "gain, percentage points" if narrow else _TITLE
    grid += f'<text class="soft" text-anchor="middle" x="{(left + right) / 2:.1f}" y="{y + 40}">{title}</text>'
    return _document(groups, width, y + 50, grid + "".join(body))


def _panels(groups: Sequence[_Group], width: int) -> str:
    """Draw a panel for each student, as many beside each other as there is room for, all with the same axis."""
    methods = [method for method, _, _ in groups[0][1]]
    left = 22 + 7 * min(max(map(len, methods)), 24)
    beside = min(len(groups), max(1, (width - left) // _PANEL))
    panel = (width - left) / beside
    axis = _range([edge for _, rows in groups for edge in _edges(rows)], 4)
    body: list[str] = []
    y = _TOP
    for first in range(0, len(groups), beside):
        top, bottom = y + _ROW, y + _ROW * (1 + len(methods))
        for row, method in enumerate(methods):
            middle = top + _ROW * (row + 0.5)
            body.append(f'<text x="4" y="{middle + 4:g}">{escape(_cut(method, 24))}</text>')
            if row:
                body.append(
                    f'<line class="rule" x1="0" x2="{width}" y1="{middle - _ROW / 2}" y2="{middle - _ROW / 2}"/>'
                )
        for column, (name, rows) in enumerate(groups[first : first + beside]):
            begin, end = left + column * panel + 8, left + (column + 1) * panel - 6
            x = _scale(axis, begin, end - 100)
            body.append(
                f'<text class="name" x="{begin:.1f}" y="{y + 17}">{escape(_cut(name, int(panel - 14) // 8))}</text>'
            )
            body.append(_grid(axis, x, top - 2, bottom))
            for row, (method, result, colour) in enumerate(rows):
                label = f"{name}, {method}"
                body.append(_row(label, _percent(result.gain), colour, x, y=top + _ROW * (row + 0.5), right=end))
        y = bottom + 36
    body.append(f'<text class="soft" text-anchor="middle" x="{(left + width) / 2:.1f}" y="{y + 4}">{_TITLE}</text>')
    return _document(groups, width, y + 14, "".join(body))


def _grid(axis: _Axis, x: _Scale, top: float, bottom: float) -> str:
    low, high, step = axis
    ticks = [round(low / step) + index for index in range(round((high - low) / step) + 1)]
    return "".join(
        f'<line class="{"zero" if tick == 0 else "grid"}" x1="{x(tick * step):.1f}" x2="{x(tick * step):.1f}" y1="{top}" y2="{bottom + 5}"/>'
        f'<text class="soft" text-anchor="middle" x="{x(tick * step):.1f}" y="{bottom + 20}">{_signed(tick * step, _digits(step))}</text>'
        for tick in ticks
    )


def _document(groups: Sequence[_Group], width: int, height: float, body: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="gains" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(_alternative(groups))}"><style>{_STYLE}</style>{body}</svg>'
    )


def _row(label: str, spread: Spread, colour: str, x: _Scale, *, y: float, right: float) -> str:
    mean, deviation = spread.mean, spread.deviation
    if mean is None:
        return f'<text class="soft" text-anchor="end" x="{right:g}" y="{y + 4:g}">no pair of runs</text>'
    parts = [f"<g><title>{escape(label)}: {_text(spread)} percentage points</title>"]
    if deviation is not None:
        a, b = x(mean - deviation), x(mean + deviation)
        parts.append(
            f'<path class="whisker" style="stroke:{colour}" d="M{a:.1f} {y - 5:g}v10M{a:.1f} {y:g}H{b:.1f}M{b:.1f} {y - 5:g}v10"/>'
        )
        parts += [
            f'<circle class="seed" style="stroke:{colour}" cx="{x(value):.1f}" cy="{y:g}" r="3.5">'
            f"<title>{escape(label)}, seed {seed}: {_signed(value)}</title></circle>"
            for seed, value in spread.values.items()
        ]
    parts.append(f'<circle class="mean" style="fill:{colour}" cx="{x(mean):.1f}" cy="{y:g}" r="6"/>')
    parts.append(f'<text text-anchor="end" x="{right:g}" y="{y + 4:g}">{_text(spread)}</text></g>')
    return "".join(parts)


def _percent(spread: Spread | None) -> Spread:
    return Spread({} if spread is None else {seed: 100 * value for seed, value in spread.values.items()})


def _edges(rows: Sequence[_Row]) -> Iterator[float]:
    """Yield all values that an axis must hold."""
    for spread in (_percent(result.gain) for _, result, _ in rows):
        if spread.mean is not None:
            deviation = spread.deviation or 0.0
            yield from (*spread.values.values(), spread.mean - deviation, spread.mean + deviation)


def _scale(axis: _Axis, left: float, right: float) -> _Scale:
    low, high, _ = axis
    return lambda value: left + (value - low) / (high - low) * (right - left)


def _range(values: list[float], intervals: int) -> _Axis:
    """Return an axis that holds the values and zero: its ends, both multiples of its step, and the step."""
    low, high = min([0.0, *values]), max([0.0, *values])
    rough = max(high - low, 0.1) / intervals
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return (low, high, step) if high > low else (low, low + step, step)


def _digits(step: float) -> int:
    return max(0, -math.floor(math.log10(step) + 1e-9))


def _signed(value: float, digits: int = 2) -> str:
    text = f"{abs(value):.{digits}f}"
    if not float(text):
        return text
    return f"{'+' if value > 0 else '−'}{text}"


def _text(spread: Spread) -> str:
    mean, deviation = spread.mean, spread.deviation
    if mean is None:
        return "none"
    return _signed(mean) if deviation is None else f"{_signed(mean)} ± {deviation:.2f}"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: max(length - 1, 1)] + "…"


def _alternative(groups: Sequence[_Group]) -> str:
    lines = [f"{name}, {method}: {_text(_percent(result.gain))}" for name, rows in groups for method, result, _ in rows]
    return "Gain in test accuracy over training alone, in percentage points. " + "; ".join(lines)
