"""How the server rejects a call, why it cannot run, and text of peers made safe to show."""

from __future__ import annotations

from codistill.process.exit_codes import ExitCode
from codistill_server.rounds.actions import Status

__all__ = ["RequestRejected", "ServerError"]

_LONGEST = 500  # a status travels percent-encoded in HTTP/2 headers, which gRPC limits to 8 KiB


class RequestRejected(Exception):  # noqa: N818 - an answer, not a fault
    """A call is rejected; `status` says how, the text why and what to do."""

    def __init__(self, status: Status, message: str) -> None:
        self.status = status
        super().__init__(message if len(message) <= _LONGEST else f"{message[: _LONGEST - 3]}...")


class ServerError(RuntimeError):
    """The server cannot run; the text says why and what to do, `code` how the process should end."""

    def __init__(self, message: str, code: ExitCode = ExitCode.CONFIGURATION) -> None:
        self.code = code
        super().__init__(message)
