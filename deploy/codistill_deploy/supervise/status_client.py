"""Ask a run's server where the run stands: once, or again and again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import cast

import grpc

from codistill.process.exit_codes import ExitCode
from codistill.v1 import distillation_pb2 as pb
from codistill.v1.distillation_pb2_grpc import DistillationServiceStub
from codistill.wire import diagnose
from codistill.wire.proxy import proxy_advice
from codistill.wire.security import REFUSALS, Security
from codistill.wire.times import duration
from codistill_deploy.errors import CommandError

__all__ = ["fetch_status", "watch_status"]

_CALL_SECONDS = 5.0
_WATCH_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.keepalive_time_ms", 10_000),  # a machine that vanished says nothing
    ("grpc.keepalive_timeout_ms", 10_000),
]


def fetch_status(address: str, security: Security | None = None) -> pb.Run:
    """Return where the run of a server stands.

    Args:
        address: the server's "HOST:PORT".
        security: TLS and token.

    Raises:
        CommandError: no codistill server answers at the address, or it refuses the caller.
        SecurityError: a certificate or key cannot be used.
    """
    security = security or Security()
    with security.channel(address) as channel:
        try:
            return DistillationServiceStub(channel).GetRun(pb.GetRunRequest(), timeout=_CALL_SECONDS).run
        except grpc.RpcError as error:
            call = cast("grpc.Call", error)  # what a failed call raises is the call itself
            code, details = call.code(), " ".join(str(call.details()).split())
    if code in REFUSALS:
        raise CommandError(f"server {address} refused: {details}", ExitCode.REFUSED)
    reason = diagnose.explain(address, security) if code is grpc.StatusCode.UNAVAILABLE else None
    if reason is not None:
        raise CommandError(f"server {address}: {reason}", ExitCode.REFUSED)
    advice = proxy_advice(address) or "check the address with --server, or name the run's folder with --run-dir"
    raise CommandError(f"server {address} does not answer: {code.name}: {details}; {advice}", ExitCode.UNREACHABLE)


def watch_status(
    find_address: Callable[[], str | None],
    show: Callable[[pb.Run], None],
    over: threading.Event,
    security: Security | None = None,
    interval: float = 0.5,
) -> None:
    """Show where a run stands again and again, until it is over; wait for a server that is away.

    Args:
        find_address: returns the server's "HOST:PORT", which may have moved; None while there is none.
        show: called with each state, from this thread.
        over: set to stop.
        security: TLS and token.
        interval: seconds between two states.
    """
    while not over.is_set():
        address = find_address()
        if address is None:
            over.wait(interval)
            continue
        with (security or Security()).channel(address, _WATCH_OPTIONS) as channel:
            try:
                request = pb.WatchRunRequest(interval=duration(interval))
                for response in DistillationServiceStub(channel).WatchRun(request):
                    show(response.run)
                    if over.is_set() or response.run.complete:
                        return
            except grpc.RpcError:
                over.wait(interval)
