"""The gRPC server: the service, gRPC's own health and reflection services, and the port."""

from __future__ import annotations

import socket
from typing import Any, cast

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from codistill.wire.channel import format_address, server_options
from codistill.wire.token import Token
from codistill_server.errors import ServerError
from codistill_server.rpc.auth import TokenInterceptor
from codistill_server.rpc.requests import ParsingInterceptor
from codistill_server.rpc.service import SERVICE, DistillationService

__all__ = ["GrpcServer"]


class GrpcServer:
    """A gRPC server of one service.

    Args:
        service: the service.
        receive_limit: the largest message accepted, in bytes.
        keepalive: seconds between two pings.
        token: the token that every call must carry; None for none.
        reflect: serve gRPC reflection.
    """

    def __init__(
        self,
        service: DistillationService,
        *,
        receive_limit: int,
        keepalive: float,
        token: Token | None,
        reflect: bool,
    ) -> None:
        interceptors = [*([] if token is None else [TokenInterceptor(token)]), ParsingInterceptor()]
        self._server = grpc.aio.server(interceptors=interceptors, options=server_options(receive_limit, keepalive))
        self._server.add_generic_rpc_handlers((service.handler(),))
        self._health = cast("Any", health).aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if reflect:
            names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)

    def bind(self, host: str, port: int, credentials: grpc.ServerCredentials | None) -> int:
        """Bind a port and return its number; port 0 takes a free one.

        Raises:
            ServerError: the port cannot be listened on.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        address = format_address(host, port)
        try:
            # gRPC's own error would not say why.
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
            if credentials is None:
                return self._server.add_insecure_port(address)
            return self._server.add_secure_port(address, credentials)
        except (OSError, RuntimeError) as error:
            why = getattr(error, "strerror", None) or "it is in use, or not this machine's"
            raise ServerError(
                f"listen: {address} cannot be listened on: {why}; choose another address with --listen"
            ) from error

    async def start(self) -> None:
        """Start answering calls."""
        await self._server.start()
        for name in ("", SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def stop_being_healthy(self) -> None:
        """Report NOT_SERVING to health checks from now on."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace: float) -> None:
        """Stop answering calls; those under way have `grace` seconds."""
        await self._server.stop(grace)

    async def wait_for_termination(self) -> None:
        """Wait until the server has stopped; raise the error, if any, that ended gRPC's own loop."""
        await self._server.wait_for_termination()
