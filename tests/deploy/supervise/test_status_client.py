"""The requests of `codistill status` and the live view to a server, protected or not."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from codistill.process.exit_codes import ExitCode
from codistill.v1 import distillation_pb2 as pb
from codistill.v1.distillation_pb2_grpc import DistillationServiceServicer, add_DistillationServiceServicer_to_server
from codistill.wire.security import Security
from codistill.wire.times import seconds
from codistill_deploy.errors import CommandError
from codistill_deploy.supervise.health import check_server
from codistill_deploy.supervise.status_client import fetch_status, watch_status
from support_certificates import TOKEN, Certificates


class Server(DistillationServiceServicer):
    """Answers calls with the right token, and ends every other call with a code."""

    def __init__(self, code: grpc.StatusCode = grpc.StatusCode.UNAUTHENTICATED) -> None:
        self.code = code
        self.refused = threading.Event()

    def _check(self, context: Any) -> None:
        if dict(context.invocation_metadata()).get("authorization") != f"Bearer {TOKEN}":
            self.refused.set()
            context.abort(self.code, "not you;\n  give something else")

    def GetRun(self, request: pb.GetRunRequest, context: Any) -> pb.GetRunResponse:  # noqa: N802 - gRPC's name
        self._check(context)
        return pb.GetRunResponse(run=pb.Run(name="small"))

    def WatchRun(self, request: pb.WatchRunRequest, context: Any) -> Generator[pb.WatchRunResponse]:  # noqa: N802 - gRPC's name
        self._check(context)
        assert seconds(request.interval) == 0.1
        yield pb.WatchRunResponse(run=pb.Run(name="small", complete=True))


@contextlib.contextmanager
def serving(servicer: Server, security: Security) -> Generator[str]:
    server = grpc.server(ThreadPoolExecutor(2))
    add_DistillationServiceServicer_to_server(servicer, server)
    credentials = security.server_credentials()
    assert credentials is not None
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def test_with_the_token_it_is_answered(certificates: Certificates) -> None:
    with serving(Server(), certificates.of("server", "ca")) as address:
        assert fetch_status(address, certificates.of("worker", "ca", TOKEN)).name == "small"


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED])
def test_a_refusal_is_one_line_and_a_code_of_its_own(code: grpc.StatusCode, certificates: Certificates) -> None:
    with serving(Server(code), certificates.of("server")) as address, pytest.raises(CommandError) as caught:
        fetch_status(address, certificates.of(None, "ca"))
    assert str(caught.value) == f"server {address} refused: not you; give something else"
    assert caught.value.code is ExitCode.REFUSED


def test_a_handshake_that_fails_is_explained(certificates: Certificates) -> None:
    wants = "it asks for a client's certificate"
    protected = serving(Server(), certificates.of("server", "ca"))
    with protected as address, pytest.raises(CommandError, match=wants) as caught:
        fetch_status(address, certificates.of(None, "ca", TOKEN))
    assert caught.value.code is ExitCode.REFUSED


def test_the_live_view_sends_the_token_too(certificates: Certificates) -> None:
    seen: list[pb.Run] = []
    with serving(Server(), certificates.of("server", "ca")) as address:
        watch_status(
            lambda: address, seen.append, threading.Event(), certificates.of("worker", "ca", TOKEN), interval=0.1
        )
    assert [run.name for run in seen] == ["small"]


def test_a_refused_live_view_shows_nothing_and_ends_when_the_run_is_over(certificates: Certificates) -> None:
    seen: list[pb.Run] = []
    servicer, over = Server(), threading.Event()
    with serving(servicer, certificates.of("server")) as address:
        arguments = (lambda: address, seen.append, over, certificates.of(None, "ca"), 0.1)
        watching = threading.Thread(target=watch_status, args=arguments)
        watching.start()
        assert servicer.refused.wait(30)
        over.set()
        watching.join(30)
        assert not watching.is_alive()
    assert seen == []


def test_a_server_behind_a_proxy_that_is_away_is_named_with_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    for ask in (fetch_status, check_server):
        with pytest.raises(CommandError, match=r"set no_proxy=server\.example to connect directly$") as raised:
            ask("server.example:50551")
        assert "http_proxy sends" in str(raised.value)
        assert raised.value.code is ExitCode.UNREACHABLE
