"""The errors that end a peer, or its wait."""

from __future__ import annotations

from codistill.process.exit_codes import ExitCode

__all__ = ["Interrupted", "PeerError"]


class PeerError(RuntimeError):
    """An error that ends a peer.

    Args:
        message: one line for people.
        code: the exit code of its process.
    """

    def __init__(self, message: str, code: ExitCode = ExitCode.ERROR) -> None:
        self.code = code
        super().__init__(message)


class Interrupted(Exception):  # noqa: N818 - a request, not a fault
    """The peer was asked to stop while it waited."""
