"""Whether a server serves, and whether it has a participant's worker: what a container's healthcheck asks again and again."""

from __future__ import annotations

from typing import Any, cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from codistill.process.exit_codes import ExitCode
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.proxy import proxy_advice
from codistill.wire.security import Security
from codistill.wire.words import word
from codistill_deploy.errors import CommandError
from codistill_deploy.supervise.status_client import fetch_status

__all__ = ["check_participant", "check_server"]

_CALL_SECONDS = 5.0
_HEALTHY = (pb.PARTICIPANT_STATE_CONNECTED, pb.PARTICIPANT_STATE_FINISHED)


def check_server(address: str, security: Security | None = None) -> str:
    """Check that a server serves, by gRPC's health service, which asks for no token; return a line that says so.

    Args:
        address: the server's "HOST:PORT".
        security: TLS.

    Raises:
        CommandError: it does not.
        SecurityError: a certificate or key cannot be used.
    """
    with (security or Security()).channel(address) as channel:
        try:
            stub = cast("Any", health_pb2_grpc).HealthStub(channel)  # its stubs do not know its calls
            response = stub.Check(health_pb2.HealthCheckRequest(), timeout=_CALL_SECONDS)
        except grpc.RpcError as error:
            call = cast("grpc.Call", error)  # what a failed call raises is the call itself
            details = " ".join(str(call.details()).split())
            advice = proxy_advice(address) or "check the address with --server, and the server's log"
            raise CommandError(
                f"server {address} does not answer: {call.code().name}: {details}; {advice}", ExitCode.UNREACHABLE
            ) from error
    if response.status != health_pb2.HealthCheckResponse.SERVING:
        raise CommandError(f"server {address} is going down; start it again", ExitCode.UNREACHABLE)
    return f"server {address} serves"


def check_participant(address: str, name: str, security: Security | None = None) -> str:
    """Check that a participant's worker is at its server, or has finished; return a line that says so.

    Args:
        address: the server's "HOST:PORT".
        name: the participant's name.
        security: TLS and token.

    Raises:
        CommandError: the worker is not there, or the server does not answer.
        SecurityError: a certificate or key cannot be used.
    """
    run = fetch_status(address, security)
    states = {status.name: status.state for status in run.participants}
    if name not in states:
        raise CommandError(f"--student: {name!r} is not one of the run's participants; allowed: {', '.join(states)}")
    state = word(pb.ParticipantState, states[name])
    if states[name] not in _HEALTHY:
        raise CommandError(
            f"participant {name!r} is {state} at server {address}; see its worker's log", ExitCode.UNREACHABLE
        )
    return f"participant {name!r} is {state} at server {address}"
