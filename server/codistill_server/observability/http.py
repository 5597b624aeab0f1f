"""The HTTP port: the live page, its data, and the metrics.

It only ever tells: GET and HEAD, a handful of paths, one request for each connection, and every connection is bounded in
number and time, so that whoever knocks holds up neither the others for long nor the run at all. On loopback it answers to
this machine's names only: a web site that has its own name lead here would otherwise read it in a browser of this machine.
"""

from __future__ import annotations

import gzip
import ipaddress
import logging
import socket
import socketserver
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from codistill_server.observability.dashboard.html import render_live
from codistill_server.observability.dashboard.live import LivePage

__all__ = ["HttpServer"]

_log = logging.getLogger(__name__)

_CONNECTIONS = 64
_CONNECTION_SECONDS = 30.0
_READ_SECONDS = 10.0
_COMPRESSED = 1024
_TEXT = "text/plain; charset=utf-8"
_JSON = "application/json"
_METHODS = "GET, HEAD"
_OWN_NAME = "localhost"
_NOBODY_ELSE = "default-src 'none'; frame-ancestors 'none'"


@dataclass(frozen=True)
class _Answer:
    body: bytes
    kind: str = _TEXT
    status: HTTPStatus = HTTPStatus.OK
    etag: str | None = None
    policy: str = _NOBODY_ELSE
    headers: Mapping[str, str] = field(default_factory=dict[str, str])


class HttpServer:
    """Serves a run's page and metrics from threads of its own.

    Args:
        host: where to listen.
        port: the port; 0 takes a free one.
        page: the data of the page.
        registry: the metrics.

    Raises:
        OSError: the address cannot be listened on.
    """

    def __init__(self, host: str, port: int, page: LivePage, registry: CollectorRegistry) -> None:
        self._page = page
        self._registry = registry
        html = render_live(page.title)
        body = html.text.encode()
        self._html = _Answer(body, "text/html; charset=utf-8", etag=f'"{zlib.crc32(body):08x}"', policy=html.policy)
        routes: dict[str, Callable[[str, str], _Answer]] = {
            "/": self._serve_page,
            "/now.json": self._serve_now,
            "/run.json": self._serve_document,
            "/metrics": self._serve_metrics,
        }

        class Handler(_Handler):
            answers = routes

        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        if ipaddress.ip_address(address[0]).is_loopback:
            Handler.names = frozenset({_OWN_NAME, host.lower()})

        class Server(_Bounded):
            address_family = family

        self._server = Server((str(address[0]), int(address[1])), Handler)
        self.port: int = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, name="codistill-web", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops listening; requests under way are not waited for."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _serve_page(self, query: str, accept: str) -> _Answer:
        del query, accept
        return self._html

    def _serve_now(self, query: str, accept: str) -> _Answer:
        del query, accept
        return _Answer(self._page.now().encode(), _JSON)

    def _serve_document(self, query: str, accept: str) -> _Answer:
        del query, accept
        version, document = self._page.document()
        return _Answer(document.encode(), _JSON, etag=f'"{version}"')

    def _serve_metrics(self, query: str, accept: str) -> _Answer:
        encode, kind = choose_encoder(accept)
        names = parse_qs(query).get("name[]")
        chosen: Any = self._registry.restricted_registry(names) if names else self._registry
        return _Answer(encode(chosen), kind)


class _Handler(BaseHTTPRequestHandler):
    answers: Mapping[str, Callable[[str, str], _Answer]]
    names: frozenset[str] | None = None  # those that it answers to; None for whatever it is called
    timeout = _READ_SECONDS

    def do_GET(self) -> None:
        """Answers with the body."""
        self._send(self._answer())

    def do_HEAD(self) -> None:
        """Answers without it."""
        self._send(self._answer(), body=False)

    def _answer(self) -> _Answer:
        if self.names is not None and not _is_called(self.headers.get("Host"), self.names):
            line = "this port answers to this machine's names only; ask for localhost or 127.0.0.1\n"
            return _Answer(line.encode(), status=HTTPStatus.MISDIRECTED_REQUEST)
        path, query = urlsplit(f"http://-{self.path}")[2:4] if self.path.startswith("/") else ("", "")
        answer = self.answers.get(path)
        if answer is None:
            known = ", ".join(self.answers)
            return _Answer(f"there is no such page here; there are {known}\n".encode(), status=HTTPStatus.NOT_FOUND)
        try:
            made = answer(query, self.headers.get("Accept", ""))
        except Exception as error:  # noqa: BLE001 - whatever keeps it from being told, the run goes on
            why = f"{path} cannot be told now: {str(error) or type(error).__name__}\n"
            return _Answer(why.encode(), status=HTTPStatus.SERVICE_UNAVAILABLE)
        if made.etag is not None and self.headers.get("If-None-Match") == made.etag:
            return _Answer(b"", made.kind, HTTPStatus.NOT_MODIFIED, made.etag, made.policy)
        return made

    def _send(self, answer: _Answer, *, body: bool = True) -> None:
        content = answer.body
        headers = {
            "Content-Type": answer.kind,
            "Content-Security-Policy": answer.policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-cache",
            **answer.headers,
        }
        if answer.etag is not None:
            headers["ETag"] = answer.etag
        if len(content) > _COMPRESSED and "gzip" in self.headers.get("Accept-Encoding", ""):
            content = gzip.compress(content, 1)
            headers["Content-Encoding"] = "gzip"
        if answer.status is not HTTPStatus.NOT_MODIFIED:
            headers["Content-Length"] = str(len(content))
        self.send_response(answer.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuses a request, in one plain line."""
        del message, explain
        if code == HTTPStatus.NOT_IMPLEMENTED:
            refused = HTTPStatus.METHOD_NOT_ALLOWED
            line = f"this port only tells; use {_METHODS}\n"
        else:
            refused = HTTPStatus(code)
            line = f"{refused.phrase}\n"
        if not hasattr(self, "headers"):
            self.headers = self.MessageClass()
        allow = {"Allow": _METHODS} if refused is HTTPStatus.METHOD_NOT_ALLOWED else {}
        self.close_connection = True
        self._send(_Answer(line.encode(), status=refused, headers=allow), body=self.command != "HEAD")

    def version_string(self) -> str:
        """Names the server, and no versions."""
        return "codistill"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
        """Writes nothing: whoever knocks must not fill the disk."""


def _is_called(host: str | None, names: frozenset[str]) -> bool:
    """Returns whether a request's Host is one of some names, or an address, which no web site can have as its name."""
    if host is None:  # no browser leaves it out
        return True
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name in names or name.endswith(f".{_OWN_NAME}") or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


class _Bounded(ThreadingHTTPServer):
    request_queue_size = _CONNECTIONS

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._opened: dict[socket.socket, float] = {}
        self._changing = threading.Lock()
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Binds; the base class would look the host's name up, which can take long."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """Gives a connection its thread, if there are not too many."""
        with self._changing:
            full = len(self._opened) >= _CONNECTIONS
            if not full:
                self._opened[request] = time.monotonic()
        if full:
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Ends a connection."""
        with self._changing:
            self._opened.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Cuts off whoever takes too long; called twice a second."""
        now = time.monotonic()
        with self._changing:
            late = [request for request, opened in self._opened.items() if now - opened > _CONNECTION_SECONDS]
        for request in late:
            with suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Passes over a connection that broke."""
        del request
        _log.debug("the connection of %s broke", client_address, exc_info=True)
