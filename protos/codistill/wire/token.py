"""The bearer token that every call carries where the server asks for one."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from codistill.wire.security_settings import TOKEN_FILE, TOKEN_VARIABLE, SecurityError, read_file, warn_of_readers

__all__ = ["TOKEN_HELP", "TOKEN_KEY", "Token", "attach_token", "read_token"]

TOKEN_KEY = "authorization"  # noqa: S105 - a name, no secret
"""The metadata key that holds "Bearer TOKEN"."""

TOKEN_HELP = f"give the server's own with {TOKEN_FILE} or {TOKEN_VARIABLE}"
"""The advice for a call without the right token."""

_SHORTEST_TOKEN = 16  # too long to guess
_LONGEST_TOKEN = 1024  # fits into HTTP/2 headers, which gRPC limits to 8 KiB


class Token:
    """A bearer token, which its text representation hides.

    Args:
        text: the token; white space around it is dropped.
        source: the option or variable that it comes from, for errors.

    Raises:
        SecurityError: it is empty, too short or too long, or has characters that no header can carry.
    """

    def __init__(self, text: str, source: str) -> None:
        text = text.strip()
        make = "make one with `openssl rand -hex 32`"
        if not text:
            raise SecurityError(f"{source}: the token is empty; {make}, or give none")
        if not all("!" <= character <= "~" for character in text):
            raise SecurityError(
                f"{source}: the token has other characters than visible ASCII, or spaces in between; {make}"
            )
        if not _SHORTEST_TOKEN <= len(text) <= _LONGEST_TOKEN:
            raise SecurityError(
                f"{source}: a token of {len(text)} characters is not allowed; allowed: {_SHORTEST_TOKEN} to {_LONGEST_TOKEN}; "
                f"{make}"
            )
        self._value = f"Bearer {text}"

    @property
    def metadata(self) -> tuple[str, str]:
        """The metadata entry of a call: key and "Bearer TOKEN"."""
        return TOKEN_KEY, self._value

    @property
    def plain(self) -> str:
        """The token itself, for the environment of a process on another machine."""
        return self._value.removeprefix("Bearer ")

    def matches(self, value: str | bytes) -> bool:
        """Return whether a call's metadata value is this token, in a time that does not depend on where they differ."""
        given = value if isinstance(value, bytes) else value.encode(errors="replace")
        return hmac.compare_digest(given, self._value.encode())

    def __repr__(self) -> str:
        return "Token(…)"


def read_token(path: Path | None, value: str | None) -> Token | None:
    """Return the token of a file, else that of the environment, else None.

    Args:
        path: the file, if one was named.
        value: the token in the environment, if there is one.

    Raises:
        SecurityError: the file cannot be read, or the token cannot be used.
    """
    if path is None:
        return None if value is None else Token(value, TOKEN_VARIABLE)
    source = f"{TOKEN_FILE}: {path}"
    text = read_file(path, TOKEN_FILE, 4 * _LONGEST_TOKEN)
    warn_of_readers(path, TOKEN_FILE)
    try:
        return Token(text.decode(), source)
    except UnicodeDecodeError:
        raise SecurityError(f"{source} is not text; make one with `openssl rand -hex 32`") from None


def attach_token(channel: grpc.Channel, token: Token) -> grpc.Channel:
    """Return a channel whose every call carries a token."""
    return grpc.intercept_channel(channel, _TokenInterceptor(token))


class _CallDetails(grpc.ClientCallDetails):
    """A call's details with other metadata."""

    def __init__(self, details: grpc.ClientCallDetails, metadata: tuple[tuple[str, str | bytes], ...]) -> None:
        self.method = details.method
        self.timeout = details.timeout
        self.metadata = metadata
        self.credentials = details.credentials
        self.wait_for_ready = details.wait_for_ready
        self.compression = details.compression


class _TokenInterceptor(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Adds the token to every call. gRPC's own call credentials would refuse a channel without TLS."""

    def __init__(self, token: Token) -> None:
        self._token = token

    def _with_token(self, continuation: Callable[[Any, Any], Any], details: Any, request: Any) -> Any:
        return continuation(_CallDetails(details, (*(details.metadata or ()), self._token.metadata)), request)

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return self._with_token(continuation, client_call_details, request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return self._with_token(continuation, client_call_details, request)

    def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return self._with_token(continuation, client_call_details, request_iterator)
