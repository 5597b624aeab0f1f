"""Find out why a call to a server failed, by probing its port.

gRPC reports most of these failures as a closed socket. A TLS handshake with the same files tells them apart.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time

from codistill.wire.security import Security
from codistill.wire.security_settings import TLS_CA, TLS_CERT, TLS_KEY

__all__ = ["explain"]

# The opening of HTTP/2 and an empty SETTINGS frame; every gRPC server answers with its own.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
_TYPE_AT, _SETTINGS = 3, b"\x04"  # the offset of a frame's type, and its value
_BETWEEN_SECONDS = 0.2
_EXPIRED, _NOT_YET_VALID, _WRONG_HOST, _WRONG_IP = 10, 9, 62, 64  # X509_V_ERR_…


def explain(address: str, security: Security, seconds: float = 2.0) -> str | None:
    """Return what is wrong between a server and these settings, and what to change; None if nothing is found.

    It probes twice. A server that dies during a probe closes the connection like one that rejects the client.

    Args:
        address: the server's "HOST:PORT".
        security: the settings of the failed call.
        seconds: how long one probe may take.
    """
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not port.isdigit():
        return None
    first = _probe(host, int(port), security, seconds)
    if first is None:
        return None
    time.sleep(_BETWEEN_SECONDS)
    return first if _probe(host, int(port), security, seconds) == first else None


def _probe(host: str, port: int, security: Security, seconds: float) -> str | None:
    probe = _Probe(host, port, time.monotonic() + seconds)
    try:
        return probe.with_tls(security) if security.ca is not None else probe.in_plain_text()
    except OSError:  # includes ssl.SSLError: no server is there, or its answer reveals nothing
        return None


class _Probe:
    def __init__(self, host: str, port: int, deadline: float) -> None:
        self._host = host
        self._port = port
        self._deadline = deadline

    def in_plain_text(self) -> str | None:
        with self._connect() as connection:
            if _speaks_http2(connection):
                return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # nothing is sent: this only finds out whether it speaks TLS
        with self._connect() as connection, context.wrap_socket(connection):
            return f"it speaks TLS, and this side does not: give the CA that signed its certificate with {TLS_CA}"

    def with_tls(self, security: Security) -> str | None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(security.ca)
        if security.cert is not None:
            context.load_cert_chain(security.cert, security.key, password="")
        context.set_alpn_protocols(["h2"])
        with self._connect() as connection:
            try:
                protected = context.wrap_socket(connection, server_hostname=self._host)
            except ssl.SSLCertVerificationError as error:
                return self._untrusted(error, security)
            except (ssl.SSLError, ConnectionError):
                return self._no_tls(security)
            with protected:
                return None if _speaks_http2(protected) else _client_rejected(security)

    def _untrusted(self, error: ssl.SSLCertVerificationError, security: Security) -> str:
        if error.verify_code == _EXPIRED:
            return "its certificate, or that of a CA of its, has expired: renew it and restart the server"
        if error.verify_code == _NOT_YET_VALID:
            return "its certificate is not valid yet: compare the clocks of both machines"
        if error.verify_code in (_WRONG_HOST, _WRONG_IP):
            return (
                f"its certificate is not for {self._host}: reach it by a name that the certificate holds, or make one whose "
                f"subjectAltName holds {self._host}"
            )
        return f"its certificate is not signed by a CA in {security.ca} ({error.verify_message}): give the right CA with {TLS_CA}"

    def _no_tls(self, security: Security) -> str | None:
        with self._connect() as connection:
            if not _speaks_http2(connection):
                return _client_rejected(security) if security.cert is not None else None
        return f"it does not speak TLS, and this side does: leave {TLS_CA} away, or give the server {TLS_CERT} and {TLS_KEY}"

    def _connect(self) -> socket.socket:
        connection = socket.create_connection((self._host, self._port), max(self._deadline - time.monotonic(), 0.1))
        connection.settimeout(max(self._deadline - time.monotonic(), 0.1))
        return connection


def _client_rejected(security: Security) -> str:
    if security.cert is None:
        return f"it asks for a client's certificate (mutual TLS): give one that its CA signed with {TLS_CERT} and {TLS_KEY}"
    return (
        f"it does not take the certificate {security.cert}: it has expired, or the server's {TLS_CA} did not sign it; "
        f"`openssl x509 -in {security.cert} -noout -dates -issuer` shows both"
    )


def _speaks_http2(connection: socket.socket) -> bool:
    """Return whether the server answers with HTTP/2 settings; False if it closes the connection instead.

    Raises:
        TimeoutError: it neither answers nor closes in time.
    """
    answer = b""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        connection.sendall(_PREFACE)
        while len(answer) <= _TYPE_AT:
            more = connection.recv(_TYPE_AT + 1 - len(answer))
            if not more:
                break
            answer += more
    return answer[_TYPE_AT:] == _SETTINGS
