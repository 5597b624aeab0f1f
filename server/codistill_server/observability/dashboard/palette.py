"""The colours of participants and methods, in one place for the page and for pictures.

The light colours are six of Okabe and Ito's (2008); the dark ones are lighter or stronger ones of the same hues. Any
two of a set stay apart for people with protanopia, deuteranopia or tritanopia. Past six, the page repeats the colours
with other dashes.
"""

from __future__ import annotations

__all__ = ["DARK", "LIGHT", "declarations"]

LIGHT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""For a white page."""

DARK = ("#2f8fdd", "#ee7733", "#1fb088", "#e39ac6", "#f2c755", "#93d4ff")
"""For a dark page, in the same order."""


def declarations(colours: tuple[str, ...]) -> str:
    """Return CSS declarations that name the colours ``--c0``, ``--c1`` and so on."""
    return "".join(f"--c{index}:{colour};" for index, colour in enumerate(colours))
