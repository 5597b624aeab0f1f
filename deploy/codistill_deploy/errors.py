"""The error of the commands."""

from __future__ import annotations

from codistill.process.exit_codes import ExitCode

__all__ = ["CommandError"]


class CommandError(RuntimeError):
    """A command cannot do what it was asked.

    Attributes:
        code: how the process ends; the message is for people.
    """

    def __init__(self, message: str, code: ExitCode = ExitCode.CONFIGURATION) -> None:
        self.code = code
        super().__init__(message)
