"""Text for rich that is shown as it is: no markup, no emoji codes, no control characters.

All output goes through these: :func:`make_console` instead of rich's Console, :func:`literal` instead of its Text, and no
string in a table.
"""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console, JustifyMethod, OverflowMethod
from rich.style import Style
from rich.text import Text

from codistill.process.printable import printable

__all__ = ["LiteralConsole", "literal", "make_console"]


class LiteralConsole(Console):
    """A console that shows each string as it is, wherever it stands."""

    def render_str(
        self,
        text: str,
        *,
        style: str | Style = "",
        justify: JustifyMethod | None = None,
        overflow: OverflowMethod | None = None,
        **others: Any,
    ) -> Text:
        """Return a string as text without markup; rich calls this for all strings that it prints."""
        del others  # whether it has markup, emoji codes or numbers to highlight: never
        return Text(printable(text), style=style, justify=justify, overflow=overflow)


def make_console(**options: Any) -> Console:
    """Return a console; `options` are those of rich's."""
    sizes = {name for name in ("COLUMNS", "LINES") if not os.environ.get(name, "").strip("0 ")}
    # Of a width or a height of 0, rich shows nothing.
    options.setdefault("_environ", {name: value for name, value in os.environ.items() if name not in sizes})
    return LiteralConsole(markup=False, emoji=False, highlight=False, **options)


def literal(text: str, style: str = "") -> Text:
    """Return a text in one style, as it is: for cells, headings and lines."""
    return Text(printable(text), style=style)
