"""The diagnosis of a port; the servers that keep somebody out for real are in tests/protos/peer/test_grpc_security.py."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from codistill.wire import diagnose
from codistill.wire.diagnose import explain
from codistill.wire.security import Security
from support_certificates import Certificates


@contextlib.contextmanager
def serving(security: Security) -> Generator[str]:
    server = grpc.server(ThreadPoolExecutor(1))
    credentials = security.server_credentials()
    address = "127.0.0.1:0"
    port = server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@contextlib.contextmanager
def answering(answer: bytes | None) -> Generator[str]:
    """A server that is none of ours: answers with these bytes and hangs up; None says nothing at all."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def work() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    held.append(connection)
                    if answer is not None:
                        connection.recv(24)
                        connection.sendall(answer)
                        connection.close()

        thread = threading.Thread(target=work)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in held:
            connection.close()


def test_nothing_is_wrong(certificates: Certificates) -> None:
    with serving(Security()) as address:
        assert explain(address, Security()) is None
    with serving(certificates.of("server")) as address:
        assert explain(address, certificates.of(None, "ca")) is None
        assert explain(address.replace("127.0.0.1", "localhost"), certificates.of(None, "ca")) is None
        assert explain(address, certificates.of("worker", "ca")) is None
    with serving(certificates.of("server", "ca")) as address:
        assert explain(address, certificates.of("worker", "ca")) is None


def test_a_name_that_the_certificate_does_not_hold(certificates: Certificates) -> None:
    with serving(certificates.of("elsewhere")) as address:
        for name in ("localhost", "127.0.0.1"):
            told = explain(address.replace("127.0.0.1", name), certificates.of(None, "ca"))
            assert told is not None
            assert told.startswith(f"its certificate is not for {name}: ")


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x00" * 100])
def test_a_server_of_another_kind(tls: bool, answer: bytes, certificates: Certificates) -> None:
    with answering(answer) as address:
        assert explain(address, certificates.of(None, "ca") if tls else Security()) is None


@pytest.mark.parametrize("tls", [False, True])
def test_a_server_that_says_nothing_is_left_in_time(tls: bool, certificates: Certificates) -> None:
    started = time.monotonic()
    with answering(None) as address:
        assert explain(address, certificates.of(None, "ca") if tls else Security(), 0.3) is None
    assert time.monotonic() - started < 5


def test_a_server_that_dies_while_it_is_looked_at_is_not_judged(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hangs up after the handshake, as one does that wants a certificate; but then it is gone."""
    wanting = certificates.of("server", "ca")
    with serving(wanting) as address:
        assert explain(address, certificates.of(None, "ca")) is not None
    stack = contextlib.ExitStack()
    address = stack.enter_context(serving(wanting))
    monkeypatch.setattr(diagnose.time, "sleep", lambda _: stack.close())
    assert explain(address, certificates.of(None, "ca")) is None


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere.invalid:1", "unix:/tmp/x", "x", ""])
def test_nobody_is_there(address: str, certificates: Certificates) -> None:
    for security in (Security(), certificates.of(None, "ca")):
        assert explain(address, security) is None
