"""How one side of the wire is protected: TLS by files, and a token. Server and peer read both here.

Every setting is an option of the command and an environment variable of the same meaning; the option wins. Settings are
read once, when the process starts. The token itself is never an option, and no message shows it.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from codistill.config.base import require_whole_path
from codistill.wire.proxy import is_here
from codistill.wire.security_settings import (
    TLS_CA,
    TLS_CERT,
    TLS_KEY,
    TOKEN_FILE,
    TOKEN_VARIABLE,
    SecurityError,
    Setting,
    read_file,
    warn_of_readers,
)
from codistill.wire.token import Token, attach_token, read_token

__all__ = ["REFUSALS", "Security", "read"]

REFUSALS = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
"""The status codes of a caller without access; trying again does not help."""


@dataclass(frozen=True)
class Security:
    """How one side of the wire is protected; without arguments it is not.

    Attributes:
        cert: this side's certificate, and the chain up to its CA's, as PEM.
        key: the certificate's private key, as PEM.
        ca: the certificates of the CA that signed the other side's, as PEM. On a server this asks for mutual TLS.
        token: the token that every call must carry.
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
        """The variables with which a child process reads the same settings."""
        given = ((TLS_CERT, self.cert), (TLS_KEY, self.key), (TLS_CA, self.ca), (TOKEN_FILE, self.token_file))
        return {setting.variable: str(path) for setting, path in given if path is not None}

    def server_credentials(self) -> grpc.ServerCredentials | None:
        """Return the credentials that a server listens with, or None for plain text.

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
        """Return a channel to a server; every call on it carries the token.

        gRPC takes proxies from the environment. A server on this machine is never reached through one.

        Args:
            address: the server's "HOST:PORT".
            options: gRPC channel options.

        Raises:
            SecurityError: a file is missing, cannot be read or used, or does not fit the others.
        """
        pair = self._pair()
        options = [*options, ("grpc.enable_http_proxy", 0)] if is_here(address) else list(options)
        if self.ca is not None:
            key, chain = pair or (None, None)
            credentials = grpc.ssl_channel_credentials(_read_ca(self.ca), key, chain)
            channel = grpc.secure_channel(address, credentials, options)
        elif pair is not None:
            raise SecurityError(
                f"{TLS_CERT}: a client needs {TLS_CA} too, the CA that signed the server's certificate; for a self-signed "
                "one that certificate itself"
            )
        else:
            channel = grpc.insecure_channel(address, options)
        return channel if self.token is None else attach_token(channel, self.token)

    def _pair(self) -> tuple[bytes, bytes] | None:
        """Return the key and the chain as PEM, or None where there are none."""
        if self.cert is None and self.key is None:
            return None
        if self.cert is None or self.key is None:
            given, missing = (TLS_KEY, TLS_CERT) if self.cert is None else (TLS_CERT, TLS_KEY)
            raise SecurityError(f"{given}: {missing} is needed too; a certificate and its key come together")
        chain, key = read_file(self.cert, TLS_CERT), read_file(self.key, TLS_KEY)
        warn_of_readers(self.key, TLS_KEY)
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
    """Return the settings of the options, and of the environment where an option is missing.

    A token file wins over a token in the environment.

    Args:
        cert: the option `--tls-cert`.
        key: the option `--tls-key`.
        ca: the option `--tls-ca`.
        token_file: the option `--token-file`.
        environment: the environment's variables; this process's own by default.

    Raises:
        SecurityError: a variable is empty or begins with `~`, or the token cannot be read or used.
    """
    environment = os.environ if environment is None else environment

    def named(given: Path | None, setting: Setting) -> Path | None:
        if given is not None:
            return given
        value = environment.get(setting.variable)
        if value == "":
            raise SecurityError(f"{setting.variable}: it is set and empty; name a file, or unset it")
        try:
            return None if value is None else Path(require_whole_path(value))
        except ValueError as error:
            raise SecurityError(f"{setting.variable}: {value}: {error}") from error

    file = named(token_file, TOKEN_FILE)
    token = read_token(file, environment.get(TOKEN_VARIABLE))
    return Security(named(cert, TLS_CERT), named(key, TLS_KEY), named(ca, TLS_CA), token, file)


def _read_ca(path: Path) -> bytes:
    data = read_file(path, TLS_CA)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError as error:
        raise SecurityError(
            f"{TLS_CA}: {path} cannot be used: {_reason(error)}; expected the CA's certificates as PEM"
        ) from error
    return data


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return str(reason).lower().replace("_", " ") if reason else str(error)
