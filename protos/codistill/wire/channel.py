"""Addresses, the gRPC channel options of both ends, and the metadata keys of calls."""

from __future__ import annotations

import ipaddress
from typing import Any

from codistill.config.exchange import KEEPALIVE_ANSWER
from codistill.process.exit_codes import ExitCode

__all__ = [
    "PUSHBACK_KEY",
    "SESSION_KEY",
    "SUPERSEDED_KEY",
    "AddressError",
    "client_options",
    "format_address",
    "is_loopback",
    "parse_address",
    "server_options",
    "split_address",
]

SESSION_KEY = "codistill-session"
"""The metadata key of ``Exchange`` for the session: :func:`codistill.wire.checksum.format_session`."""

SUPERSEDED_KEY = "codistill-superseded"
"""The trailing metadata key of an ABORTED that means that a newer worker took the participant over."""

PUSHBACK_KEY = "grpc-retry-pushback-ms"
"""gRPC's own trailing metadata key that says after how many milliseconds to try again."""

_STREAMS_PER_CONNECTION = 128
_HANDSHAKE_MS = 10_000
_IDLE_MS = 300_000


class AddressError(ValueError):
    """A text that is no address; the message names the option, the text and what is allowed."""

    code = ExitCode.CONFIGURATION


def split_address(text: str) -> tuple[str, int] | None:
    """Return the host, without brackets, and the port of "HOST:PORT"; None for any other text."""
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or len(port) > 5 or int(port) > 65535:
        return None
    return host.removeprefix("[").removesuffix("]"), int(port)


def parse_address(text: str, field: str) -> tuple[str, int]:
    """Return the host, without brackets, and the port of "HOST:PORT".

    Args:
        text: the address; an IPv6 host stands in brackets.
        field: the option's name, for the error.

    Raises:
        AddressError: the text has another form.
    """
    found = split_address(text)
    if found is None:
        raise AddressError(f"{field}: {text!r} is not an address; expected HOST:PORT with a port of 0 to 65535")
    return found


def format_address(host: str, port: int) -> str:
    """Return "HOST:PORT", with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a host: `localhost` or a loopback address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def client_options(keepalive: float = 20.0) -> list[tuple[str, Any]]:
    """Return the channel options of a client that keeps a session.

    Args:
        keepalive: seconds between the pings that find a server which vanished without a word.
    """
    return [
        ("grpc.max_receive_message_length", -1),  # the server is trusted to send targets of any size
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", int(1000 * keepalive)),
        ("grpc.keepalive_timeout_ms", int(1000 * KEEPALIVE_ANSWER)),
        ("grpc.http2.ping_timeout_ms", int(1000 * KEEPALIVE_ANSWER)),  # for the pings with which gRPC measures the link
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # Left alone, the channel would wait up to two minutes between two attempts, and fail every call meanwhile.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.enable_retries", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]


def server_options(receive_limit: int, keepalive: float = 30.0) -> list[tuple[str, int]]:
    """Return the server's channel options.

    Pings find a peer that vanished without a word. They also keep links alive that clouds cut after four idle minutes. The
    server allows the peers' own pings. It closes a connection without an HTTP/2 client after 10 s, and one without calls
    after five minutes.

    Args:
        receive_limit: the largest message accepted, in bytes.
        keepalive: seconds between two pings.
    """
    return [
        ("grpc.max_receive_message_length", receive_limit),
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", int(1000 * keepalive)),
        ("grpc.keepalive_timeout_ms", int(1000 * KEEPALIVE_ANSWER)),
        # gRPC also sends pings to measure the link. While one of those is unanswered, only this time-out counts.
        ("grpc.http2.ping_timeout_ms", int(1000 * KEEPALIVE_ANSWER)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.so_reuseport", 0),
        ("grpc.max_concurrent_streams", _STREAMS_PER_CONNECTION),
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
        ("grpc.max_connection_idle_ms", _IDLE_MS),
    ]
