"""HTML pages that need nothing else: no network, no fonts, no other file."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib import resources
from string import Template
from typing import Any, cast

from codistill_server.observability.dashboard import palette

__all__ = ["LiveHtml", "embedded_json", "encoded_json", "render", "render_live", "script", "style"]


_LIBRARY = "vendor/uPlot.iife.min.js"


def render(document: dict[str, Any]) -> str:
    """Return the page that shows a document; see :mod:`codistill_server.observability.dashboard.document` for its form.

    The page's content security policy allows its own two scripts and no others, and no loading of anything.
    """
    kind = "comparison" if document["kind"] == "comparison" else "run"
    policy = _policy(script(), "'unsafe-inline'")  # pictures of gains bring a style sheet of their own
    return _page(f"{document['title']}: codistill {kind}", document, script(), policy)


@dataclass(frozen=True)
class LiveHtml:
    """The page of a run while it goes on.

    Attributes:
        text: the page.
        policy: its content security policy for a header: only its own content, and no other page may frame it.
    """

    text: str
    policy: str


def render_live(title: str) -> LiveHtml:
    """Return the page of a run while it goes on; it fetches the document from the server that it came from.

    Its content security policy allows its own two scripts and its style sheet, and no loading from elsewhere.
    """
    code = f"{script()}\n{_text('assets/live.js')}"
    policy = f"{_policy(code, _hash(style()))}; connect-src 'self'; base-uri 'none'; form-action 'none'"
    text = _page(f"{title}: codistill run", {"kind": "live", "title": title}, code, policy)
    return LiveHtml(text, f"{policy}; frame-ancestors 'none'")


def _policy(code: str, styles: str) -> str:
    scripts = " ".join(_hash(content) for content in (_text(_LIBRARY), code))
    return f"default-src 'none'; script-src {scripts}; style-src {styles}; img-src data:"


def _page(title: str, document: dict[str, Any], code: str, policy: str) -> str:
    return Template(_text("assets/page.html")).substitute(
        title=escape(title),
        policy=policy,
        style=style(),
        document=embedded_json(document),
        library=_text(_LIBRARY),
        script=code,
    )


def embedded_json(document: dict[str, Any]) -> str:
    """Return a document as JSON in which no character can end a script element or begin a comment.

    Raises:
        ValueError: a number is not finite, which JSON cannot hold.
    """
    text = json.dumps(document, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def encoded_json(value: object, depth: int = 4) -> str:
    """Return a value as JSON, encoded in pieces of some kilobytes: other threads wait for one piece at most.

    Args:
        value: plain data.
        depth: how many levels of dicts and lists are pieces of their own.

    Raises:
        ValueError: a number is not finite, which JSON cannot hold.
    """
    if depth and isinstance(value, dict):
        members = cast("dict[str, object]", value).items()
        return f"{{{','.join(f'{json.dumps(key)}:{encoded_json(member, depth - 1)}' for key, member in members)}}}"
    if depth and isinstance(value, list):
        return f"[{','.join(encoded_json(member, depth - 1) for member in cast('list[object]', value))}]"
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def script() -> str:
    """Return the script that draws a document: ``codistill.render(document)``, again for each newer one."""
    return _text("assets/page.js")


def style() -> str:
    """Return the style sheet, with that of the charts and with the colours."""
    light = f":root{{{palette.declarations(palette.LIGHT)}}}"
    dark = f"@media screen and (prefers-color-scheme:dark){{:root:not([data-print]){{{palette.declarations(palette.DARK)}}}}}"
    return "\n".join((_text("vendor/uPlot.min.css"), light, dark, _text("assets/page.css")))


@cache
def _text(name: str) -> str:
    return resources.files("codistill_server.observability.dashboard").joinpath(name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
