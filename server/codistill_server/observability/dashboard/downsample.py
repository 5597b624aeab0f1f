"""Series as columns of numbers for a page: thinned out, rounded and finite."""

from __future__ import annotations

import math
from collections.abc import Iterable

__all__ = ["LIMIT", "column", "evenly_spaced", "finite", "neighbour_groups", "rounded"]

LIMIT = 500
"""The most points of a series."""


def evenly_spaced(count: int, limit: int = LIMIT) -> list[int]:
    """Return the indices of the points to draw of a curve of `count`: evenly spaced, with the first and the last.

    Series of the same length keep the same points, so participants measured together stay comparable.
    """
    if count <= limit:
        return list(range(count))
    return [round(position * (count - 1) / (limit - 1)) for position in range(limit)]


def neighbour_groups(count: int, limit: int = LIMIT) -> list[range]:
    """Return at most `limit` ranges that divide `count` spans into groups of neighbours, of nearly equal size."""
    groups = min(count, limit)
    return [range(group * count // groups, (group + 1) * count // groups) for group in range(groups)]


def finite(value: float | None) -> float | None:
    """Return a number if it is finite, else None."""
    return value if value is not None and math.isfinite(value) else None


def column(values: Iterable[float | None]) -> list[float | None]:
    """Return a series of rounded numbers, None where a value is not finite.

    The last known value is not rounded: the page rounds it itself, and to round it twice might show another number.
    """
    known = [finite(value) for value in values]
    last = max((index for index, value in enumerate(known) if value is not None), default=-1)
    return [value if index == last else rounded(value) for index, value in enumerate(known)]


def rounded(value: float | None) -> float | None:
    """Return a number of five significant digits, None if it is not finite.

    That is more than any screen shows, and half the bytes.
    """
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")
