"""The options and variables that protect the wire, and the files that they name."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from codistill.process.exit_codes import ExitCode

__all__ = [
    "TLS_CA",
    "TLS_CERT",
    "TLS_KEY",
    "TOKEN_FILE",
    "TOKEN_VARIABLE",
    "SecurityError",
    "Setting",
    "read_file",
    "warn_of_readers",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setting:
    """A file that an option or an environment variable names."""

    option: str
    variable: str

    def __str__(self) -> str:
        return f"{self.option} ({self.variable})"


TLS_CERT = Setting("--tls-cert", "CODISTILL_TLS_CERT")
TLS_KEY = Setting("--tls-key", "CODISTILL_TLS_KEY")
TLS_CA = Setting("--tls-ca", "CODISTILL_TLS_CA")
TOKEN_FILE = Setting("--token-file", "CODISTILL_TOKEN_FILE")
TOKEN_VARIABLE = "CODISTILL_TOKEN"  # noqa: S105 - a name, no secret
"""The environment variable that may hold the token itself."""


class SecurityError(ValueError):
    """Certificates or the token cannot be used as they are; the text names the setting, the file, and what to do."""

    code = ExitCode.CONFIGURATION


def read_file(path: Path, setting: Setting, limit: int = 1 << 20) -> bytes:
    """Return what a file holds.

    Args:
        path: the file.
        setting: what named it, for errors.
        limit: the most bytes that it may hold.

    Raises:
        SecurityError: it cannot be read, or is too large.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise SecurityError(f"{setting}: {path} cannot be read: {error.strerror}; name another file") from error
    if len(data) > limit:
        raise SecurityError(f"{setting}: {path} is larger than {limit} bytes; name another file")
    return data


def warn_of_readers(path: Path, setting: Setting) -> None:
    """Log a warning if other users can read a secret file."""
    mode = path.stat().st_mode & 0o777
    if mode & 0o044:
        _log.warning("%s: %s can be read by other users (mode %03o); chmod 600 it", setting, path, mode)
