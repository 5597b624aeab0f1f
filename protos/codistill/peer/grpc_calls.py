"""The server's calls over gRPC, what they return, and how their failures are read."""

from __future__ import annotations

from typing import Any, cast

import grpc
from google.protobuf.message import DecodeError

from codistill.peer.steps import Failure
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.channel import PUSHBACK_KEY, SUPERSEDED_KEY
from codistill.wire.checksum import append_checksum, verify_checksum

__all__ = ["Broken", "Damaged", "Stub", "decode_join_response", "decode_reply", "read_failure"]


class Broken(grpc.RpcError):
    """The connection is of no use any more, and no status of the server says why."""

    def __init__(self, details: str) -> None:
        self._details = details
        super().__init__(details)

    def code(self) -> grpc.StatusCode:
        """Return the status code of a server that is away."""
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        """Return what is wrong, for people."""
        return self._details


class Damaged(Broken):
    """The bytes that arrived are not those that the server sent."""

    def __init__(self, message: str, raw: bytes) -> None:
        super().__init__(f"a {message} of {len(raw)} bytes was damaged on the way: its checksum is missing or wrong")


class Stub:
    """The server's calls. Requests get a checksum; responses stay bytes, as damage must not look like a refusal.

    Args:
        channel: what to call on.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        service = pb.DESCRIPTOR.services_by_name["DistillationService"].full_name

        def unary(name: str) -> Any:
            return channel.unary_unary(
                f"/{service}/{name}", request_serializer=append_checksum, response_deserializer=None
            )

        self.join = unary("Join")
        self.report = unary("Report")
        self.leave = unary("Leave")
        self.exchange: Any = channel.stream_stream(f"/{service}/Exchange", None, None)


def decode_join_response(raw: bytes) -> pb.JoinResponse:
    """Decode the response of Join.

    Raises:
        Damaged: the bytes are not those that the server sent.
    """
    damaged = Damaged("JoinResponse", raw)
    try:
        response = pb.JoinResponse.FromString(raw)
    except DecodeError:
        raise damaged from None
    if response.HasField("checksum") and not verify_checksum(raw):
        raise damaged
    return response


def decode_reply(raw: bytes) -> pb.ExchangeResponse:
    """Decode a message of the stream, which must have a checksum.

    Raises:
        Damaged: the bytes are not those that the server sent.
    """
    if not verify_checksum(raw):
        raise Damaged("reply", raw)
    return pb.ExchangeResponse.FromString(raw)


def read_failure(error: grpc.RpcError) -> Failure:
    """Return how a call or a stream failed."""
    status = cast("Any", error)
    code = status.code() if callable(getattr(error, "code", None)) else grpc.StatusCode.UNKNOWN
    details = status.details() if callable(getattr(error, "details", None)) else str(error)
    trailing = dict(getattr(error, "trailing_metadata", tuple)() or ())
    return Failure(
        code.name,
        " ".join(str(details).split()),
        superseded=code is grpc.StatusCode.ABORTED and SUPERSEDED_KEY in trailing,
        pushback=PUSHBACK_KEY in trailing,
        damaged=isinstance(error, Damaged),
    )
