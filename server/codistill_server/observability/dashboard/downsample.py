"""Series as columns of numbers for a page: cut down, rounded, and finite."""

from __future__ import annotations

import math
from collections.abc import Iterable

__all__ = ["LIMIT", "column", "grouped", "number", "short", "thinned"]

LIMIT = 500
"""The most points of a series."""


def thinned(count: int, limit: int = LIMIT) -> list[int]:
    """Returns which of `count` points of a curve to draw: evenly spaced, the first and the last among them.

    Series of the same length keep the same points, so students measured together stay comparable.
    """
    if count <= limit:
        return list(range(count))
    return [round(position * (count - 1) / (limit - 1)) for position in range(limit)]


def grouped(count: int, limit: int = LIMIT) -> list[range]:
    """Returns how to merge `count` spans into at most `limit` groups of neighbours, so that no maximum is lost."""
    groups = min(count, limit)
    return [range(number * count // groups, (number + 1) * count // groups) for number in range(groups)]


def number(value: float | None) -> float | None:
    """Returns a number if it is finite."""
    return value if value is not None and math.isfinite(value) else None


def column(values: Iterable[float | None]) -> list[float | None]:
    """Returns a series' numbers, the last that is known unrounded: to round it twice might show another number."""
    known = [number(value) for value in values]
    last = max((index for index, value in enumerate(known) if value is not None), default=-1)
    return [value if index == last else short(value) for index, value in enumerate(known)]


def short(value: float | None) -> float | None:
    """Returns a number with five significant digits: more than any screen shows, and half the bytes."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")
