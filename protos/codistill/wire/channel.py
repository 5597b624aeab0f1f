"""Addresses, the options of both ends of a connection, and the metadata of its calls."""

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
"""The metadata key of ``Exchange`` that holds the session's number, in decimal."""

SUPERSEDED_KEY = "codistill-superseded"
"""The trailing metadata key that is set where ABORTED means that a newer worker took the student over."""

PUSHBACK_KEY = "grpc-retry-pushback-ms"
"""gRPC's own trailing metadata key that says after how many milliseconds to try again."""

_STREAMS_PER_CONNECTION = 128
_HANDSHAKE_MS = 10_000
_IDLE_MS = 300_000


class AddressError(ValueError):
    """A text is no address; it names the option, the text and what is allowed."""

    code = ExitCode.CONFIGURATION


def split_address(text: str) -> tuple[str, int] | None:
    """Returns the host, without brackets, and the port of "HOST:PORT"; None if a text is not of that form."""
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or len(port) > 5 or int(port) > 65535:
        return None
    return host.removeprefix("[").removesuffix("]"), int(port)


def parse_address(text: str, field: str) -> tuple[str, int]:
    """Returns the host and port of "HOST:PORT".

    Args:
        text: the address; an IPv6 host stands in brackets.
        field: how an error names it.

    Raises:
        AddressError: it is not of that form.
    """
    found = split_address(text)
    if found is None:
        raise AddressError(f"{field}: {text!r} is not an address; expected HOST:PORT with a port of 0 to 65535")
    return found


def format_address(host: str, port: int) -> str:
    """Returns "HOST:PORT", with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Returns whether a host can only be reached from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def client_options(keepalive: float = 20.0) -> list[tuple[str, Any]]:
    """Returns the channel options of a client that keeps a session.

    Args:
        keepalive: seconds between the pings that find a server which vanished without a word.
    """
    return [
        ("grpc.max_receive_message_length", -1),  # the server is trusted to send targets of any size
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", int(1000 * keepalive)),
        ("grpc.keepalive_timeout_ms", int(1000 * KEEPALIVE_ANSWER)),
        ("grpc.http2.ping_timeout_ms", int(1000 * KEEPALIVE_ANSWER)),  # of pings with which gRPC measures the link
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # Left alone, the channel would wait up to two minutes between two attempts, and fail every call meanwhile.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.enable_retries", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]


def server_options(receive_limit: int, keepalive: float = 30.0) -> list[tuple[str, int]]:
    """Returns the server's channel options.

    Pings find a peer that vanished without a word, and keep links alive that clouds cut when idle for four minutes; the
    workers' own pings are welcome. A connection that is not a client's after 10 s, or makes no call for five minutes, is
    closed.

    Args:
        receive_limit: the largest message taken, in bytes.
        keepalive: seconds between two pings.
    """
    return [
        ("grpc.max_receive_message_length", receive_limit),
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", int(1000 * keepalive)),
        ("grpc.keepalive_timeout_ms", int(1000 * KEEPALIVE_ANSWER)),
        # gRPC sends pings of its own, to measure the link; while one of them is out, only this time-out counts.
        ("grpc.http2.ping_timeout_ms", int(1000 * KEEPALIVE_ANSWER)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.so_reuseport", 0),
        ("grpc.max_concurrent_streams", _STREAMS_PER_CONNECTION),
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
        ("grpc.max_connection_idle_ms", _IDLE_MS),
    ]
