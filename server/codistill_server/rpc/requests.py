"""Parses requests and verifies their checksums; each fault gets a status that names it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from codistill.wire.checksum import has_checksum, verify_checksum
from codistill_server.errors import RequestRejected
from codistill_server.rounds.actions import Status
from codistill_server.rpc.status import Context, abort

__all__ = [
    "DAMAGED",
    "DamagedRequest",
    "ParsingInterceptor",
    "has_checksum_field",
    "parse",
    "parse_undamaged",
]

_Request = TypeVar("_Request", bound=Message)

DAMAGED = "was damaged on the way: its checksum is missing or wrong"


class DamagedRequest(Exception):  # noqa: N818 - the network's fault, and mended by sending again
    """A request's bytes are not those that were sent."""


def parse(request_type: type[_Request], raw: bytes) -> _Request:
    """Return a message from its bytes.

    Raises:
        RequestRejected: the bytes are no such message.
    """
    try:
        return request_type.FromString(raw)
    except DecodeError as error:
        message = f"{len(raw)} bytes are not a {request_type.DESCRIPTOR.full_name}: {error}"
        raise RequestRejected(Status.INVALID_ARGUMENT, message) from error


def parse_undamaged(request_type: type[_Request], raw: bytes) -> _Request:
    """Return a message from its bytes, with its checksum verified if it has one.

    Raises:
        RequestRejected: the bytes are no such message.
        DamagedRequest: they are not those to which the checksum was appended.
    """
    if not has_checksum_field(request_type):
        return parse(request_type, raw)
    damaged = DamagedRequest(f"a {request_type.DESCRIPTOR.full_name} of {len(raw)} bytes {DAMAGED}")
    try:
        message = parse(request_type, raw)
    except RequestRejected:
        if has_checksum(raw) and not verify_checksum(raw):
            raise damaged from None
        raise
    if message.HasField("checksum") and not verify_checksum(raw):
        raise damaged
    return message


def has_checksum_field(message_type: type[Message]) -> bool:
    """Return whether messages of a type carry a checksum."""
    return "checksum" in message_type.DESCRIPTOR.fields_by_name


class ParsingInterceptor(grpc.aio.ServerInterceptor):
    """Parses the requests of gRPC's own services, health and reflection, so that malformed ones are rejected.

    Without it, each such call would end with UNKNOWN and leave a traceback in the log.
    """

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """Return the call's handler, which parses the requests itself where gRPC would have."""
        handler = await continuation(handler_call_details)
        deserializer = getattr(handler, "request_deserializer", None)
        if deserializer is None:  # no such method, or one defined here
            return handler
        request_type: type[Message] = deserializer.__self__

        async def parsed(raw: bytes, context: Context) -> Message:
            try:
                return parse(request_type, raw)
            except RequestRejected as rejected:
                await abort(context, rejected)

        async def unary(raw: bytes, context: Context) -> Any:
            call = handler.unary_stream if handler.response_streaming else handler.unary_unary
            return await call(await parsed(raw, context), context)

        async def stream(raws: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
            async def requests() -> AsyncIterator[Message]:
                async for raw in raws:
                    yield await parsed(raw, context)

            async for reply in handler.stream_stream(requests(), context):
                yield reply

        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(stream, None, handler.response_serializer)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(unary, None, handler.response_serializer)
        return grpc.unary_unary_rpc_method_handler(unary, None, handler.response_serializer)
