"""A container's healthcheck, and the command that makes it."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from codistill.process.exit_codes import ExitCode
from codistill.v1 import distillation_pb2 as pb
from codistill.v1.distillation_pb2_grpc import DistillationServiceServicer, add_DistillationServiceServicer_to_server
from codistill_deploy.cli.app import app
from codistill_deploy.errors import CommandError
from codistill_deploy.supervise.health import check_participant, check_server

STATES = {
    "ant": pb.PARTICIPANT_STATE_CONNECTED,
    "bee": pb.PARTICIPANT_STATE_FINISHED,
    "cat": pb.PARTICIPANT_STATE_EXPECTED,
    "dog": pb.PARTICIPANT_STATE_DISCONNECTED,
    "elk": pb.PARTICIPANT_STATE_FAILED,
}


class Run(DistillationServiceServicer):
    """Has a participant in each state."""

    def GetRun(self, request: pb.GetRunRequest, context: Any) -> pb.GetRunResponse:  # noqa: N802 - gRPC's name
        participants = [pb.ParticipantStatus(name=name, state=state) for name, state in STATES.items()]
        return pb.GetRunResponse(run=pb.Run(participants=participants))


@contextlib.contextmanager
def serving(status: int = health_pb2.HealthCheckResponse.SERVING) -> Generator[str]:
    server = grpc.server(ThreadPoolExecutor(2))
    add_DistillationServiceServicer_to_server(Run(), server)
    healthy = cast("Any", health).HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    healthy.set("", status)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def test_a_server_that_serves() -> None:
    with serving() as address:
        assert check_server(address) == f"server {address} serves"


def test_a_server_that_goes_down() -> None:
    with serving(health_pb2.HealthCheckResponse.NOT_SERVING) as address, pytest.raises(CommandError) as caught:
        check_server(address)
    assert str(caught.value) == f"server {address} is going down; start it again"
    assert caught.value.code is ExitCode.UNREACHABLE


def test_no_server() -> None:
    with pytest.raises(CommandError, match=r"server 127\.0\.0\.1:1 does not answer: UNAVAILABLE: .*--server") as caught:
        check_server("127.0.0.1:1")
    assert caught.value.code is ExitCode.UNREACHABLE


@pytest.mark.parametrize(("name", "state"), [("ant", "connected"), ("bee", "finished")])
def test_a_participant_that_is_there_or_done(name: str, state: str) -> None:
    with serving() as address:
        assert check_participant(address, name) == f"participant {name!r} is {state} at server {address}"


@pytest.mark.parametrize(("name", "state"), [("cat", "expected"), ("dog", "disconnected"), ("elk", "failed")])
def test_a_participant_that_is_not(name: str, state: str) -> None:
    with serving() as address, pytest.raises(CommandError) as caught:
        check_participant(address, name)
    assert str(caught.value) == f"participant {name!r} is {state} at server {address}; see its worker's log"
    assert caught.value.code is ExitCode.UNREACHABLE


def test_the_error_of_an_unknown_participant_names_the_known_ones() -> None:
    with (
        serving() as address,
        pytest.raises(CommandError, match=r"'fox' is not one .*allowed: ant, bee, cat, dog, elk"),
    ):
        check_participant(address, "fox")


def test_the_command_says_it_in_a_line() -> None:
    with serving() as address:
        for options, line in ((), f"server {address} serves"), (("--student", "ant"), "participant 'ant' is connected"):
            result = CliRunner().invoke(app, ["health", "--server", address, *options])
            assert (result.exit_code, result.output.count("\n")) == (0, 1)
            assert line in result.output
