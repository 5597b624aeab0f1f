"""How a rejected call ends: its gRPC status, text and trailing metadata."""

from __future__ import annotations

from typing import Any, NoReturn, TypeAlias

import grpc
import grpc.aio

from codistill.wire.channel import PUSHBACK_KEY, SUPERSEDED_KEY
from codistill_server.errors import RequestRejected
from codistill_server.rounds.actions import Status
from codistill_server.rpc.quotas import QuotaExceeded

__all__ = ["GOING_DOWN", "Context", "abort"]

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

GOING_DOWN = "the server is going down; try again until it is back"

_CODES = {
    Status.ABORTED: grpc.StatusCode.ABORTED,
    Status.SUPERSEDED: grpc.StatusCode.ABORTED,
    Status.FAILED_PRECONDITION: grpc.StatusCode.FAILED_PRECONDITION,
    Status.INVALID_ARGUMENT: grpc.StatusCode.INVALID_ARGUMENT,
}


async def abort(context: Context, rejected: RequestRejected | QuotaExceeded) -> NoReturn:
    """End a call with the status of a rejection; above a quota, with the milliseconds until it may try again."""
    if isinstance(rejected, QuotaExceeded):
        pushback = ((PUSHBACK_KEY, str(max(round(1000 * rejected.seconds), 1))),)
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(rejected), pushback)
    trailing = ((SUPERSEDED_KEY, "1"),) if rejected.status is Status.SUPERSEDED else ()
    await context.abort(_CODES[rejected.status], str(rejected), trailing)
