"""What ends a peer, or its wait."""

from __future__ import annotations

from codistill.process.exit_codes import ExitCode

__all__ = ["Interrupted", "PeerError"]


class PeerError(RuntimeError):
    """Something that ends a peer; the text is one line for people, `code` how its process ends."""

    def __init__(self, message: str, code: ExitCode = ExitCode.ERROR) -> None:
        self.code = code
        super().__init__(message)


class Interrupted(Exception):  # noqa: N818 - a request, not a fault
    """The peer was asked to stop while it waited."""
