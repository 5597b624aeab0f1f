"""How a campaign reaches a server: with the token that the server asks for, or as a stranger without it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc.aio

from codistill.peer.grpc import GrpcTransport
from codistill.wire.security import Security
from codistill.wire.token import Token

OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
]


@dataclass(frozen=True)
class Endpoint:
    """A server's address and what opens it.

    Attributes:
        address: its "HOST:PORT".
        token: what every call carries, if the server asks for it.
    """

    address: str
    token: Token | None = None

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    @property
    def metadata(self) -> Sequence[tuple[str, str]]:
        return () if self.token is None else (self.token.metadata,)

    @property
    def stranger(self) -> Endpoint:
        """The same for somebody who does not have the token."""
        return Endpoint(self.address)

    def channel(self, *options: tuple[str, Any]) -> grpc.aio.Channel:
        """Return a channel of its own connection; calls add `metadata` themselves."""
        return grpc.aio.insecure_channel(self.address, [*OPTIONS, *options])

    def transport(self, stop: threading.Event) -> GrpcTransport:
        """Return the transport of a healthy worker."""
        security = Security(token=self.token)
        return GrpcTransport(self.address, connect_timeout=30, give_up_after=60, stop=stop, security=security)
