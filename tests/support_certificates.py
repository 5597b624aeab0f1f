"""Certificates of every kind that a test of the wire needs, made once and written as PEM files."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from pathlib import Path

import trustme

from codistill.wire.security import Security
from codistill.wire.token import Token

TOKEN = "correct-horse-battery-staple-4711"
WRONG_TOKEN = "wrong-horse-battery-staple-4711"
HOST = "127.0.0.1"
_PAST = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)


@dataclass(frozen=True)
class Certificates:
    """A folder with `ca.pem`, `other-ca.pem`, and NAME.pem and NAME.key for each certificate.

    `server` and `worker` are as they should be; `expired` was; `elsewhere` is for another host; `stranger` is signed by
    another CA.
    """

    folder: Path

    def of(self, name: str | None, ca: str | None = None, token: str | None = None) -> Security:
        """Return settings with one of the certificates, one of the CAs, and a token."""
        return Security(
            None if name is None else self.folder / f"{name}.pem",
            None if name is None else self.folder / f"{name}.key",
            None if ca is None else self.folder / f"{ca}.pem",
            None if token is None else Token(token, "a test"),
        )

    def token_file(self, token: str = TOKEN) -> Path:
        path = self.folder / f"{token.split('-', 1)[0]}.token"
        path.write_text(f"{token}\n")
        path.chmod(0o600)
        return path


def make_certificates(folder: Path) -> Certificates:
    ca, other = trustme.CA(), trustme.CA()
    ca.cert_pem.write_to_path(folder / "ca.pem")
    other.cert_pem.write_to_path(folder / "other-ca.pem")
    made = {
        "server": ca.issue_cert(HOST, "localhost"),
        "worker": ca.issue_cert("worker"),
        "expired": ca.issue_cert(HOST, not_after=_PAST),
        "elsewhere": ca.issue_cert("elsewhere.example"),
        "stranger": other.issue_cert(HOST),
    }
    for name, cert in made.items():
        path = folder / f"{name}.pem"
        path.write_bytes(b"".join(part.bytes() for part in cert.cert_chain_pems))
        cert.private_key_pem.write_to_path(folder / f"{name}.key")
        (folder / f"{name}.key").chmod(0o600)
    return Certificates(folder)
