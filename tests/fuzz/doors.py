"""How a campaign reaches a server. A server that asks for more (a token, TLS) is reached through a door that has it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from codistill_worker.client import GrpcExchange

OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
]


@dataclass(frozen=True)
class Door:
    """A server's address and what opens it.

    Attributes:
        address: its "HOST:PORT".
        metadata: what every call carries, such as a bearer token.
        credentials: the channel's, where the port speaks TLS.
    """

    address: str
    metadata: Sequence[tuple[str, str]] = ()
    credentials: grpc.ChannelCredentials | None = None

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def channel(self, *options: tuple[str, Any]) -> grpc.aio.Channel:
        """Returns a channel of its own connection; calls add `metadata` themselves."""
        every = [*OPTIONS, *options]
        if self.credentials is not None:
            return grpc.aio.secure_channel(self.address, self.credentials, every)
        return grpc.aio.insecure_channel(self.address, every)

    def exchange(self, stop: threading.Event) -> GrpcExchange:
        """Returns what an honest worker talks through."""
        return GrpcExchange(self.address, connect_timeout=30, give_up_after=60, stop=stop)
