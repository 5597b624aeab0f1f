"""The HTTP port: the live page, its data, and the metrics.

It is read-only: GET and HEAD, a few paths, one request for each connection. Connections are bounded in number and time, so
that no client holds up the others for long, or the run at all. On loopback it answers to this machine's names only.
Otherwise a web site whose name leads here could read it in a browser of this machine.
"""

from __future__ import annotations

import gzip
import ipaddress
import logging
import re
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
_COMPRESS_FROM = 1024  # bytes
_TEXT = "text/plain; charset=utf-8"
_JSON = "application/json"
_METHODS = "GET, HEAD"
_LOCAL_NAME = "localhost"
_LARGEST_PORT = 65535
# A host and its port and nothing else: a URL's other parts, as in `evil.example@localhost`, make no host.
_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._-]+)(:(?P<port>[0-9]{0,5}))?", re.ASCII)
_CLOSED_POLICY = "default-src 'none'; frame-ancestors 'none'"


@dataclass(frozen=True)
class _Response:
    body: bytes
    content_type: str = _TEXT
    status: HTTPStatus = HTTPStatus.OK
    etag: str | None = None
    policy: str = _CLOSED_POLICY
    headers: Mapping[str, str] = field(default_factory=dict[str, str])


class HttpServer:
    """Serves a run's page and metrics, in threads of its own.

    Args:
        host: the address to listen on.
        port: the port; 0 chooses a free one.
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
        self._html = _Response(body, "text/html; charset=utf-8", etag=f'"{zlib.crc32(body):08x}"', policy=html.policy)
        paths: dict[str, Callable[[str, str], _Response]] = {
            "/": self._serve_page,
            "/now.json": self._serve_now,
            "/run.json": self._serve_document,
            "/metrics": self._serve_metrics,
        }

        class Handler(_Handler):
            routes = paths

        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        if ipaddress.ip_address(address[0]).is_loopback:
            Handler.names = frozenset({_LOCAL_NAME, host.lower()})

        class Server(_BoundedServer):
            address_family = family

        self._server = Server((str(address[0]), int(address[1])), Handler)
        self.port: int = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, name="codistill-web", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening, without waiting for requests under way."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _serve_page(self, query: str, accept: str) -> _Response:
        del query, accept
        return self._html

    def _serve_now(self, query: str, accept: str) -> _Response:
        del query, accept
        return _Response(self._page.now().encode(), _JSON)

    def _serve_document(self, query: str, accept: str) -> _Response:
        del query, accept
        version, document = self._page.document()
        return _Response(document.encode(), _JSON, etag=f'"{version}"')

    def _serve_metrics(self, query: str, accept: str) -> _Response:
        encode, content_type = choose_encoder(accept)
        names = parse_qs(query).get("name[]")
        selected: Any = self._registry.restricted_registry(names) if names else self._registry
        return _Response(encode(selected), content_type)


class _Handler(BaseHTTPRequestHandler):
    routes: Mapping[str, Callable[[str, str], _Response]]
    names: frozenset[str] | None = None  # the host names to answer to; None for any
    timeout = _READ_SECONDS

    def do_GET(self) -> None:
        """Respond with headers and body."""
        self._send(self._respond())

    def do_HEAD(self) -> None:
        """Respond with headers alone."""
        self._send(self._respond(), body=False)

    def _respond(self) -> _Response:
        hosts = self.headers.get_all("Host", [])
        missing = not hosts and self.request_version != "HTTP/1.0"
        if missing or len(hosts) > 1 or not all(_is_host(host) for host in hosts):
            line = "Host: one host is allowed, as a name or an address, and its port\n"
            return _Response(line.encode(), status=HTTPStatus.BAD_REQUEST)
        if self.names is not None and not all(_names_this_host(host, self.names) for host in hosts):
            line = "this port answers to this machine's names only; ask for localhost or 127.0.0.1\n"
            return _Response(line.encode(), status=HTTPStatus.MISDIRECTED_REQUEST)
        path, query = urlsplit(f"http://-{self.path}")[2:4] if self.path.startswith("/") else ("", "")
        route = self.routes.get(path)
        if route is None:
            known = ", ".join(self.routes)
            return _Response(f"there is no such page here; there are {known}\n".encode(), status=HTTPStatus.NOT_FOUND)
        try:
            response = route(query, self.headers.get("Accept", ""))
        except Exception as error:  # noqa: BLE001 - the run goes on, whatever the error
            why = f"{path} cannot be shown now: {str(error) or type(error).__name__}\n"
            return _Response(why.encode(), status=HTTPStatus.SERVICE_UNAVAILABLE)
        if response.etag is not None and self.headers.get("If-None-Match") == response.etag:
            return _Response(b"", response.content_type, HTTPStatus.NOT_MODIFIED, response.etag, response.policy)
        return response

    def _send(self, response: _Response, *, body: bool = True) -> None:
        content = response.body
        headers = {
            "Content-Type": response.content_type,
            "Content-Security-Policy": response.policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-cache",
            **response.headers,
        }
        if response.etag is not None:
            headers["ETag"] = response.etag
        if len(content) > _COMPRESS_FROM and "gzip" in self.headers.get("Accept-Encoding", ""):
            content = gzip.compress(content, 1)
            headers["Content-Encoding"] = "gzip"
        if response.status is not HTTPStatus.NOT_MODIFIED:
            headers["Content-Length"] = str(len(content))
        self.send_response(response.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Reject a request in one plain line."""
        del message, explain
        if code == HTTPStatus.NOT_IMPLEMENTED:
            status = HTTPStatus.METHOD_NOT_ALLOWED
            line = f"this port only tells; use {_METHODS}\n"
        else:
            status = HTTPStatus(code)
            line = f"{status.phrase}\n"
        if not hasattr(self, "headers"):
            self.headers = self.MessageClass()
        allow = {"Allow": _METHODS} if status is HTTPStatus.METHOD_NOT_ALLOWED else {}
        self.close_connection = True
        self._send(_Response(line.encode(), status=status, headers=allow), body=self.command != "HEAD")

    def version_string(self) -> str:
        """Return the server's name without versions."""
        return "codistill"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
        """Write nothing: clients must not be able to fill the disk."""


def _is_host(host: str) -> bool:
    """Return whether a request's Host is a name or an address with a port, if any, that there can be."""
    found = _HOST.fullmatch(host)
    return found is not None and int(found["port"] or 0) <= _LARGEST_PORT


def _names_this_host(host: str, names: frozenset[str]) -> bool:
    """Return whether a request's Host is one of `names`, or an address of loopback."""
    found = _HOST.fullmatch(host)
    if found is None:
        return False
    name = found["name"].lower()
    if name in names or name.endswith(f".{_LOCAL_NAME}"):
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


class _BoundedServer(ThreadingHTTPServer):
    request_queue_size = _CONNECTIONS

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._opened: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Bind, without the base class's look-up of the host's name, which can take long."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection its thread, unless there are too many."""
        with self._lock:
            full = len(self._opened) >= _CONNECTIONS
            if not full:
                self._opened[request] = time.monotonic()
        if full:
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """End a connection."""
        with self._lock:
            self._opened.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Cut off connections that take too long; called twice a second."""
        now = time.monotonic()
        with self._lock:
            late = [request for request, opened in self._opened.items() if now - opened > _CONNECTION_SECONDS]
        for request in late:
            with suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a connection that broke."""
        del request
        _log.debug("the connection of %s broke", client_address, exc_info=True)
