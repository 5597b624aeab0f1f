"""From where the gRPC port can be reached, and how it is protected there."""

from __future__ import annotations

import logging

from codistill.wire.channel import format_address, is_loopback
from codistill.wire.security import Security
from codistill.wire.security_settings import TLS_CA, TLS_CERT, TLS_KEY, TOKEN_FILE
from codistill_server.errors import ServerError

__all__ = ["check_protection", "protection", "reachable_address", "warn_of_partial_protection"]

_log = logging.getLogger(__name__)


def check_protection(host: str, security: Security, *, insecure: bool) -> None:
    """Check that a port beyond loopback has TLS or a token, unless `insecure` allows it without.

    Raises:
        ServerError: nothing protects the port.
    """
    if not (is_loopback(host) or security.serves_tls or security.token is not None or insecure):
        raise ServerError(
            f"--listen: {host} can be reached from other machines and nothing protects the port; listen on 127.0.0.1, give "
            f"{TLS_CERT} and {TLS_KEY}, or {TOKEN_FILE}; or give --insecure where the network is trusted"
        )


def warn_of_partial_protection(host: str, security: Security) -> None:
    """Log a warning where a port beyond loopback has a token without TLS, or TLS that admits everybody."""
    if is_loopback(host):
        return
    if not security.serves_tls and security.token is not None:
        _log.warning("without TLS the token and all data can be read on the way; give %s and %s", TLS_CERT, TLS_KEY)
    elif security.serves_tls and security.ca is None and security.token is None:
        _log.warning("TLS alone keeps nobody out; give %s for mutual TLS, or %s", TLS_CA, TOKEN_FILE)


def protection(security: Security) -> str:
    """Return a port's protection in words."""
    tls = "plain text" if not security.serves_tls else "TLS" if security.ca is None else "mutual TLS"
    return f"{tls}, {'no token' if security.token is None else 'token'}"


def reachable_address(host: str, port: int) -> str:
    """Return where to reach a port; if it is on all interfaces, by the loopback address, which a certificate can hold."""
    loopback = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104
    return format_address(loopback.get(host, host), port)
