"""How the server turns a call away, and what strangers wrote in words that can be shown."""

from __future__ import annotations

from codistill_server.rounds.events import Status

__all__ = ["RequestRejected", "printable"]

_LONGEST = 500  # a status travels percent-encoded in HTTP/2 headers, which gRPC limits to 8 KiB


class RequestRejected(Exception):  # noqa: N818 - an answer, not a fault
    """A call is turned away; `status` says how, the text why and what to do."""

    def __init__(self, status: Status, message: str) -> None:
        self.status = status
        super().__init__(message if len(message) <= _LONGEST else f"{message[: _LONGEST - 3]}...")


def printable(text: str) -> str:
    """Returns what a worker wrote as one line that does nothing to a terminal."""
    return text if text.isprintable() else "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
