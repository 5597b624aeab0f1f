"""The HTTP port: what it tells, and whom it refuses."""

from __future__ import annotations

import gzip
import http.client
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Gauge

from codistill.config.experiment import parse
from codistill.v1 import distillation_pb2 as pb
from codistill_server.observability import http as http_server
from codistill_server.observability.dashboard.html import render_live
from codistill_server.observability.dashboard.live import LivePage
from codistill_server.observability.http import HttpServer

EXPERIMENT = parse(
    "name: x\ndata: {dataset: digits}\ntraining: {epochs: 1}\nstudents: [{name: a, model: mlp}, {name: b, model: mlp}]\n"
)
PATHS = ("/", "/now.json", "/run.json", "/metrics")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    registry = CollectorRegistry()
    Gauge("codistill_thing", "A thing.", registry=registry).set(3)
    Gauge("codistill_other", "Another.", registry=registry)
    made = HttpServer("127.0.0.1", 0, LivePage(EXPERIMENT, tmp_path_factory.mktemp("run"), pb.Run), registry)
    yield made
    made.close()


def asked(served: HttpServer, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def raw(served: HttpServer, content: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
        connection.sendall(content)
        return b"".join(iter(lambda: connection.recv(4096), b""))


@pytest.mark.parametrize("path", PATHS)
def test_head_tells_what_get_tells_without_its_body(served: HttpServer, path: str) -> None:
    status, headers, body = asked(served, path)
    assert status == 200
    assert body
    head = asked(served, path, "HEAD")
    assert head[0] == 200
    assert head[2] == b""
    assert head[1]["Content-Length"] == headers["Content-Length"] == str(len(body))


@pytest.mark.parametrize("path", [*PATHS, "/nowhere"])
def test_every_answer_says_what_a_browser_may_not_do_with_it(served: HttpServer, path: str) -> None:
    _, headers, _ = asked(served, path)
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; ")
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-cache"
    assert "Access-Control-Allow-Origin" not in headers
    assert headers["Server"] == "codistill", "and no version of Python's"


def test_the_pages_policy_is_in_the_page_too_and_its_title_is_text(served: HttpServer) -> None:
    _, headers, body = asked(served, "/")
    found = re.search(r'Content-Security-Policy" content="([^"]+)"', body.decode())
    assert found
    assert headers["Content-Security-Policy"] == f"{found[1]}; frame-ancestors 'none'"
    assert "connect-src 'self'" in found[1]
    assert b"<title>x: codistill run</title>" in body
    assert "<b>x" not in render_live("<b>x</b>").text


@pytest.mark.parametrize("path", ["/nowhere", "/metrics/", "/../etc/passwd", "*", "http://h/metrics"])
def test_another_path_is_not_found(served: HttpServer, path: str) -> None:
    status, headers, body = asked(served, path, Host="localhost")
    assert status == 404
    assert headers["Content-Type"] == "text/plain; charset=utf-8"
    assert body == b"there is no such page here; there are /, /now.json, /run.json, /metrics\n"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:9464",
        "localhost.evil.example",
        "127.0.0.1.evil",
        "evillocalhost",
        "localhost.",
        "127.1",
        "8.8.8.8",
        "0.0.0.0",  # noqa: S104
        "192.0.2.7:80",
        "[2001:db8::1]:9464",
    ],
)
def test_a_name_that_leads_here_from_elsewhere_is_not_answered(served: HttpServer, host: str, path: str) -> None:
    status, headers, body = asked(served, path, Host=host)
    assert status == 421
    assert body == b"this port answers to this machine's names only; ask for localhost or 127.0.0.1\n"
    assert "ETag" not in headers


@pytest.mark.parametrize(
    "host",
    [
        "evil.example@localhost",
        "evil.example:x@localhost",
        "127.0.0.1:80@evil.example",
        "localhost:80:80",
        "localhost/evil.example",
        "localhost#evil.example",
        "localhost?evil.example",
        "localhost evil.example",
        "localhost,evil.example",
        "[::1]evil.example",
        "[localhost]",
        "[::1",
        "::1",
        "localhost:http",
        "localhost:65536",
        "local\x1fhost",
        "",
    ],
)
def test_a_host_with_anything_but_a_name_and_a_port_is_refused(served: HttpServer, host: str) -> None:
    status, headers, body = asked(served, "/metrics", Host=host)
    assert status == 400
    assert body == b"Host: one host is allowed, as a name or an address, and its port\n"
    assert "ETag" not in headers


def test_two_hosts_are_refused(served: HttpServer) -> None:
    answer = raw(served, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
    assert b" 400 " in answer.splitlines()[0]


@pytest.mark.parametrize("header", [b"", b"Host : localhost\r\n"])
def test_a_request_without_a_host_is_refused(served: HttpServer, header: bytes) -> None:
    answer = raw(served, b"GET /metrics HTTP/1.1\r\n" + header + b"\r\n")
    assert b" 400 " in answer.splitlines()[0]


@pytest.mark.parametrize(
    "host", ["localhost:1", "LOCALHOST", "run.localhost:9464", "127.0.0.1", "127.0.0.2:65535", "[::1]:9464"]
)
def test_this_machine_s_names_and_addresses_are_answered(served: HttpServer, host: str) -> None:
    assert asked(served, "/now.json", Host=host)[0] == 200
    assert raw(served, b"GET /metrics HTTP/1.0\r\n\r\n").splitlines()[0].endswith(b" 200 OK")


def test_beyond_loopback_and_by_the_name_that_it_was_given_it_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **more: find({"Node": "127.0.0.1"}.get(host, host), *rest, **more)
    )
    for given, called, status in (("0.0.0.0", "node.example", 200), ("Node", "node", 200), ("Node", "other", 421)):  # noqa: S104
        made = HttpServer(given, 0, LivePage(EXPERIMENT, tmp_path, pb.Run), CollectorRegistry())
        try:
            assert asked(made, "/metrics", Host=called)[0] == status
        finally:
            made.close()


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "NONSENSE"])
def test_another_method_is_not_allowed(served: HttpServer, method: str) -> None:
    status, headers, body = asked(served, "/metrics", method)
    assert status == 405
    assert headers["Allow"] == "GET, HEAD"
    assert body == b"this port only tells; use GET, HEAD\n"


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/nonsense\r\n\r\n", 400),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431),
    ],
)
def test_what_is_no_request_is_refused_in_one_line(served: HttpServer, content: bytes, status: int) -> None:
    answer = raw(served, content)
    assert f" {status} ".encode() in answer.splitlines()[0] or answer.startswith(b"Bad Request")
    assert b"<" not in answer
    assert asked(served, "/metrics")[0] == 200


def test_what_is_known_is_not_sent_again(served: HttpServer) -> None:
    for path in ("/", "/run.json"):
        tag = asked(served, path)[1]["ETag"]
        status, headers, body = asked(served, path, If_None_Match=tag)
        assert (status, body) == (304, b"")
        assert headers["ETag"] == tag
        assert asked(served, path, If_None_Match='"another"')[0] == 200


def test_what_is_large_is_compressed_for_who_can_read_it(served: HttpServer) -> None:
    plain = asked(served, "/")[2]
    _, headers, body = asked(served, "/", Accept_Encoding="gzip, deflate")
    assert headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(body) == plain
    assert len(body) < len(plain) / 2


def test_the_metrics_are_prometheus_and_open_metrics(served: HttpServer) -> None:
    status, headers, body = asked(served, "/metrics")
    assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert b"codistill_thing 3.0" in body
    chosen = asked(served, "/metrics?name[]=codistill_thing")[2]
    assert b"codistill_thing 3.0" in chosen
    assert b"codistill_other" not in chosen
    newer = asked(served, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert newer[1]["Content-Type"].startswith("application/openmetrics-text")
    assert newer[2].endswith(b"# EOF\n")


def test_a_state_that_cannot_be_had_is_said(tmp_path: Path) -> None:
    def snapshot() -> pb.Run:
        raise TimeoutError

    made = HttpServer("127.0.0.1", 0, LivePage(EXPERIMENT, tmp_path, snapshot), CollectorRegistry())
    try:
        assert asked(made, "/now.json")[0::2] == (503, b"/now.json cannot be shown now: TimeoutError\n")
    finally:
        made.close()


def test_connections_are_bounded_in_number_and_in_time(served: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "_CONNECTIONS", 5)
    monkeypatch.setattr(http_server, "_CONNECTION_SECONDS", 3.0)
    held = [socket.create_connection(("127.0.0.1", served.port), timeout=20) for _ in range(5)]
    try:
        deadline = time.monotonic() + 2.5
        refused = False
        while not refused and time.monotonic() < deadline:
            try:
                refused = raw(served, b"GET /metrics HTTP/1.0\r\n\r\n") == b""
            except ConnectionError:
                refused = True
        assert refused, "the sixth is turned away"
        assert all(connection.recv(1) == b"" for connection in held), "who says nothing is cut off"
        assert asked(served, "/metrics")[0] == 200
    finally:
        for connection in held:
            connection.close()


def test_a_name_that_is_no_host_and_a_busy_port_cannot_be_listened_on(served: HttpServer, tmp_path: Path) -> None:
    for host, port in (("127.0.0.1", served.port), ("no.such.host.invalid", 0)):
        with pytest.raises(OSError, match=r".+"):
            HttpServer(host, port, LivePage(EXPERIMENT, tmp_path, pb.Run), CollectorRegistry())
