"""A report's document -> one HTML page that needs nothing else: no network, no fonts, no other file."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from html import escape
from importlib import resources
from string import Template
from typing import Any

from codistill_server.page import palette

__all__ = ["embedded", "render", "script", "style"]


def render(document: dict[str, Any]) -> str:
    """Returns the page that shows a document; see :mod:`codistill_server.page.document` for its form.

    The page's content security policy lets its own two scripts run and nothing else, and lets nothing be loaded.
    """
    kind = "comparison" if document["kind"] == "comparison" else "run"
    library = _text("vendor/uPlot.iife.min.js")
    return Template(_text("assets/page.html")).substitute(
        title=escape(f"{document['title']}: codistill {kind}"),
        hashes=" ".join(_hash(each) for each in (library, script())),
        style=style(),
        document=embedded(document),
        library=library,
        script=script(),
    )


def embedded(document: dict[str, Any]) -> str:
    """Returns a document as JSON in which no character can end a script element or begin a comment.

    Raises:
        ValueError: a number is not finite, which JSON cannot hold.
    """
    text = json.dumps(document, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def script() -> str:
    """Returns the script that draws a document: ``codistill.render(document)``, again whenever there is a newer one."""
    return _text("assets/page.js")


def style() -> str:
    """Returns the style sheet, the charts' and the colours included."""
    light = f":root{{{palette.declarations(palette.LIGHT)}}}"
    dark = f"@media screen and (prefers-color-scheme:dark){{:root:not([data-print]){{{palette.declarations(palette.DARK)}}}}}"
    return "\n".join((_text("vendor/uPlot.min.css"), light, dark, _text("assets/page.css")))


@cache
def _text(name: str) -> str:
    return resources.files("codistill_server.page").joinpath(name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
