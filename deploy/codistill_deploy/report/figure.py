"""The picture of gains: a dot for each mean, a whisker for its spread, a ring for every seed, as one SVG.

It carries its own colours for light and dark, so it stands alone as a file and inside the report.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape

from codistill_deploy.comparison import Comparison, Result, Spread
from codistill_server.page import palette

__all__ = ["gain_svg"]

_Scale = Callable[[float], float]

_ROW = 26
_TOP = 12
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
    """Draws every student's gain with every method, and the mean over students, in percentage points.

    The mean over seeds is a dot, one sample standard deviation to each side a whisker, each seed a ring. Colours tell
    students apart; where there are several methods they tell methods apart.

    Args:
        comparison: what to draw; rows without a gain say so.
        width: of the picture in pixels; under 600 the labels are set more closely.

    Returns:
        An SVG document without an XML declaration, every text in it escaped.
    """
    narrow = width < 600
    several = len(comparison.others) > 1
    groups: list[tuple[str, list[tuple[str, Result, str]]]] = [
        (
            student.name,
            [
                (method, student.results[method], f"var(--c{(column if several else number) % len(palette.LIGHT)})")
                for column, method in enumerate(comparison.others)
            ],
        )
        for number, student in enumerate(comparison.students)
    ]
    if len(comparison.students) > 1:
        groups.append(
            (
                "all students, mean",
                [
                    (
                        method,
                        comparison.means[method],
                        f"var(--c{column % len(palette.LIGHT)})" if several else "var(--ink)",
                    )
                    for column, method in enumerate(comparison.others)
                ],
            )
        )
    spreads = [_percent(result.gain) for _, rows in groups for _, result, _ in rows if result.gain is not None]
    low, high, step = _range([edge for spread in spreads for edge in _edges(spread)], 4 if narrow else 8)
    heads = several or narrow  # the name has a line of its own above the rows
    longest = max(
        (len(text) for name, rows in groups for text in ([] if heads else [name]) + [m for m, _, _ in rows if several]),
        default=0,
    )
    left = 14 if narrow and not several else min(26 + 7 * longest, int(width * 0.34))
    right = width - (104 if narrow else 130)

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

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
            body.append(_row(label, _percent(result.gain), colour, x, y=middle, width=width))
            y += _ROW
        y += 4
    ticks = [round(low / step) + number for number in range(round((high - low) / step) + 1)]
    grid = [
        f'<line class="{"zero" if tick == 0 else "grid"}" x1="{x(tick * step):.1f}" x2="{x(tick * step):.1f}" y1="{_TOP}" y2="{y + 5}"/>'
        f'<text class="soft" text-anchor="middle" x="{x(tick * step):.1f}" y="{y + 20}">{_signed(tick * step, _digits(step))}</text>'
        for tick in ticks
    ]
    title = "gain, percentage points" if narrow else "gain in test accuracy over training alone, percentage points"
    grid.append(f'<text class="soft" text-anchor="middle" x="{(left + right) / 2:.1f}" y="{y + 40}">{title}</text>')
    height = y + 50
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="gains" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(_alternative(groups))}"><style>{_STYLE}</style>{"".join(grid)}{"".join(body)}</svg>'
    )


def _row(label: str, spread: Spread, colour: str, x: _Scale, *, y: float, width: int) -> str:
    mean, deviation = spread.mean, spread.deviation
    if mean is None:
        return f'<text class="soft" text-anchor="end" x="{width - 4}" y="{y + 4:g}">no pair of runs</text>'
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
    parts.append(f'<text text-anchor="end" x="{width - 4}" y="{y + 4:g}">{_text(spread)}</text></g>')
    return "".join(parts)


def _percent(spread: Spread | None) -> Spread:
    return Spread({} if spread is None else {seed: 100 * value for seed, value in spread.values.items()})


def _edges(spread: Spread) -> list[float]:
    mean, deviation = spread.mean, spread.deviation or 0.0
    return [] if mean is None else [*spread.values.values(), mean - deviation, mean + deviation]


def _range(values: list[float], intervals: int) -> tuple[float, float, float]:
    """Returns an axis that holds the values and zero: its ends, both multiples of its step, and the step."""
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


def _alternative(groups: list[tuple[str, list[tuple[str, Result, str]]]]) -> str:
    lines = [f"{name}, {method}: {_text(_percent(result.gain))}" for name, rows in groups for method, result, _ in rows]
    return "Gain in test accuracy over training alone, in percentage points. " + "; ".join(lines)
