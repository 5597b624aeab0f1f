"""What protects the wire: TLS by files, and a bearer token. Both sides read it here, in the same way.

Every setting is an option of the command and an environment variable of the same meaning; the option wins. All of it is
read once, when the process starts. The token itself is never an option, and nothing here ever shows it.
"""

from __future__ import annotations

import hmac
import logging
import os
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from codistill.process.exit_codes import ExitCode

__all__ = [
    "REFUSALS",
    "TLS_CA",
    "TLS_CERT",
    "TLS_KEY",
    "TOKEN_FILE",
    "TOKEN_HELP",
    "TOKEN_KEY",
    "TOKEN_VARIABLE",
    "Security",
    "SecurityError",
    "Setting",
    "Token",
    "read",
]

_log = logging.getLogger(__name__)

TOKEN_KEY = "authorization"  # noqa: S105 - a name, no secret
"""The metadata key that holds "Bearer TOKEN"."""
TOKEN_VARIABLE = "CODISTILL_TOKEN"  # noqa: S105
"""The environment variable that may hold the token itself."""
REFUSALS = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
"""The status codes that say that the caller is not let in; trying again does not help."""

_SHORTEST_TOKEN, _LONGEST_TOKEN = (
    16,
    1024,
)  # no guessing it; and it fits into HTTP/2 headers, which gRPC limits to 8 KiB


@dataclass(frozen=True)
class Setting:
    """A file that is named by an option or by an environment variable."""

    option: str
    variable: str

    def __str__(self) -> str:
        return f"{self.option} ({self.variable})"


TLS_CERT = Setting("--tls-cert", "CODISTILL_TLS_CERT")
TLS_KEY = Setting("--tls-key", "CODISTILL_TLS_KEY")
TLS_CA = Setting("--tls-ca", "CODISTILL_TLS_CA")
TOKEN_FILE = Setting("--token-file", "CODISTILL_TOKEN_FILE")

TOKEN_HELP = f"give the server's own with {TOKEN_FILE} or {TOKEN_VARIABLE}"
"""What a caller without the right token is told to do."""


class SecurityError(ValueError):
    """Certificates or the token cannot be used as they are; the text names the setting, the file, and what to do."""

    code = ExitCode.CONFIGURATION


class Token:
    """A bearer token that does not show itself.

    Args:
        text: the token; white space around it is dropped.
        source: where it comes from, for errors.

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
        """What a call carries to show the token."""
        return TOKEN_KEY, self._value

    @property
    def plain(self) -> str:
        """The token itself, for the environment of a process on another machine."""
        return self._value.removeprefix("Bearer ")

    def matches(self, value: str | bytes) -> bool:
        """Whether a call's metadata value is this token; takes as long for a wrong one, wherever it differs."""
        given = value if isinstance(value, bytes) else value.encode(errors="replace")
        return hmac.compare_digest(given, self._value.encode())

    def __repr__(self) -> str:
        return "Token(…)"


@dataclass(frozen=True)
class Security:
    """How one side of the wire is protected; by default not at all.

    Attributes:
        cert: this side's certificate, and the chain up to its CA's, as PEM.
        key: the certificate's private key, as PEM.
        ca: the certificates that the other side's must be signed by, as PEM. On a server it means mutual TLS.
        token: what every call must carry.
        token_file: the file that the token was read from, if it was.
    """

    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None
    token: Token | None = None
    token_file: Path | None = None

    @property
    def serves_tls(self) -> bool:
        """Whether a server with these settings speaks TLS."""
        return self.cert is not None

    @property
    def environment(self) -> dict[str, str]:
        """What a child process needs in its environment to read the same, besides what it inherits."""
        given = ((TLS_CERT, self.cert), (TLS_KEY, self.key), (TLS_CA, self.ca), (TOKEN_FILE, self.token_file))
        return {setting.variable: str(path) for setting, path in given if path is not None}

    def server_credentials(self) -> grpc.ServerCredentials | None:
        """Returns what a server listens with, or None for plain text.

        Raises:
            SecurityError: a file is missing, cannot be read or used, or does not fit the others.
        """
        pair = self._pair()
        if pair is None:
            if self.ca is not None:
                raise SecurityError(f"{TLS_CA}: a server needs {TLS_CERT} and {TLS_KEY} too, or none of them")
            return None
        trusted = None if self.ca is None else _read_ca(self.ca)
        return grpc.ssl_server_credentials([pair], trusted, trusted is not None)

    def channel(self, address: str, options: Sequence[tuple[str, Any]] = ()) -> grpc.Channel:
        """Returns a channel to a server; every call on it carries the token.

        Raises:
            SecurityError: a file is missing, cannot be read or used, or does not fit the others.
        """
        pair = self._pair()
        if self.ca is not None:
            key, chain = pair or (None, None)
            credentials = grpc.ssl_channel_credentials(_read_ca(self.ca), key, chain)
            channel = grpc.secure_channel(address, credentials, list(options))
        elif pair is not None:
            raise SecurityError(
                f"{TLS_CERT}: a client needs {TLS_CA} too, the CA that signed the server's certificate; for a self-signed "
                "one that certificate itself"
            )
        else:
            channel = grpc.insecure_channel(address, list(options))
        return channel if self.token is None else grpc.intercept_channel(channel, _Bearer(self.token))

    def _pair(self) -> tuple[bytes, bytes] | None:
        """Returns the key and the chain after checking that they can be used, or None where there are none."""
        if self.cert is None and self.key is None:
            return None
        if self.cert is None or self.key is None:
            given, missing = (TLS_KEY, TLS_CERT) if self.cert is None else (TLS_CERT, TLS_KEY)
            raise SecurityError(f"{given}: {missing} is needed too; a certificate and its key come together")
        chain, key = _read(self.cert, TLS_CERT), _read(self.key, TLS_KEY)
        _warn_of_readers(self.key, TLS_KEY)
        try:
            # A password, so that no encrypted key asks for one on the terminal.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.cert, self.key, password="")
        except (ssl.SSLError, ValueError) as error:
            raise SecurityError(
                f"{TLS_CERT}, {TLS_KEY}: {self.cert} and {self.key} cannot be used together: {_reason(error)}; expected a "
                "certificate with its chain, and its own private key without a password, both as PEM"
            ) from error
        return key, chain


def read(
    cert: Path | None = None,
    key: Path | None = None,
    ca: Path | None = None,
    token_file: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Security:
    """Returns what the options say, and where they say nothing the environment.

    A token file wins over a token in the environment.

    Raises:
        SecurityError: a variable is empty, or the token cannot be read or used.
    """
    environment = os.environ if environment is None else environment

    def named(given: Path | None, setting: Setting) -> Path | None:
        if given is not None:
            return given
        value = environment.get(setting.variable)
        if value == "":
            raise SecurityError(f"{setting.variable}: it is set and empty; name a file, or unset it")
        return None if value is None else Path(value)

    file = named(token_file, TOKEN_FILE)
    token = _read_token(file, environment.get(TOKEN_VARIABLE))
    return Security(named(cert, TLS_CERT), named(key, TLS_KEY), named(ca, TLS_CA), token, file)


def _read_token(path: Path | None, value: str | None) -> Token | None:
    if path is None:
        return None if value is None else Token(value, TOKEN_VARIABLE)
    source = f"{TOKEN_FILE}: {path}"
    text = _read(path, TOKEN_FILE, 4 * _LONGEST_TOKEN)
    _warn_of_readers(path, TOKEN_FILE)
    try:
        return Token(text.decode(), source)
    except UnicodeDecodeError:
        raise SecurityError(f"{source} is not text; make one with `openssl rand -hex 32`") from None


def _read(path: Path, setting: Setting, limit: int = 1 << 20) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise SecurityError(f"{setting}: {path} cannot be read: {error.strerror}; name another file") from error
    if len(data) > limit:
        raise SecurityError(f"{setting}: {path} is larger than {limit} bytes; name another file")
    return data


def _read_ca(path: Path) -> bytes:
    data = _read(path, TLS_CA)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError as error:
        raise SecurityError(
            f"{TLS_CA}: {path} cannot be used: {_reason(error)}; expected the CA's certificates as PEM"
        ) from error
    return data


def _warn_of_readers(path: Path, setting: Setting) -> None:
    mode = path.stat().st_mode & 0o777
    if mode & 0o044:
        _log.warning("%s: %s can be read by other users (mode %03o); chmod 600 it", setting, path, mode)


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return str(reason).lower().replace("_", " ") if reason else str(error)


class _CallDetails(grpc.ClientCallDetails):
    """A call's details with other metadata."""

    def __init__(self, details: grpc.ClientCallDetails, metadata: tuple[tuple[str, str | bytes], ...]) -> None:
        self.method = details.method
        self.timeout = details.timeout
        self.metadata = metadata
        self.credentials = details.credentials
        self.wait_for_ready = details.wait_for_ready
        self.compression = details.compression


class _Bearer(
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
