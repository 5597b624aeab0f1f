"""Token authentication: a call without the token is refused before any of its message is read."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from codistill.wire.token import TOKEN_HELP, TOKEN_KEY, Token

__all__ = ["OPEN_METHODS", "TokenInterceptor"]

_log = logging.getLogger(__name__)

OPEN_METHODS = frozenset({"/grpc.health.v1.Health/Check"})
"""The methods that need no token: the probe of a load balancer or Kubernetes has none, and learns only that we serve.
The health service's Watch is not among them: it holds a stream for as long as its caller likes."""

_LOG_SECONDS = 10.0


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses every call whose metadata do not hold the token, except those of :data:`OPEN_METHODS`.

    Args:
        token: the token.
        clock: seconds that never go back.
    """

    def __init__(self, token: Token, clock: Callable[[], float] = time.monotonic) -> None:
        self._token = token
        self._clock = clock
        self._refused = 0
        self._logged_at: float | None = None

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Return the call's own handler, or one that refuses it."""
        if handler_call_details.method in OPEN_METHODS:
            return await continuation(handler_call_details)
        metadata = handler_call_details.invocation_metadata or ()
        given = [value for key, value in metadata if key == TOKEN_KEY]
        if len(given) == 1 and self._token.matches(given[0]):
            return await continuation(handler_call_details)
        reason = "the token given is not this server's" if given else "this server asks for a token, and none was given"

        async def refuse(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]) -> None:
            del requests
            self._log_refusal(context.peer())
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, f"{reason}; {TOKEN_HELP}")

        # A stream's handler, whatever the call is: no message is read for it before it asks for one.
        return grpc.stream_stream_rpc_method_handler(refuse, None, None)

    def _log_refusal(self, peer: str) -> None:
        """Log refusals, at most a line in 10 s: callers must not fill the disk."""
        self._refused += 1
        now = self._clock()
        if self._logged_at is None or now - self._logged_at >= _LOG_SECONDS:
            _log.warning("refused %d calls without the right token, the last from %s", self._refused, peer)
            self._refused, self._logged_at = 0, now
