"""What a worker raises.

WorkerError              anything that ends a worker; knows its exit code
└── ConfigurationError   an experiment's model, data set or checkpoint cannot be used as it is
Interrupted              the worker was asked to stop while it waited
"""

from __future__ import annotations

from codistill.process.exit_codes import ExitCode

__all__ = ["ConfigurationError", "Interrupted", "WorkerError"]


class WorkerError(RuntimeError):
    """Something that ends a worker; the text is one line for people, `code` how the process ends."""

    def __init__(self, message: str, code: ExitCode = ExitCode.ERROR) -> None:
        self.code = code
        super().__init__(message)


class ConfigurationError(WorkerError, ValueError):
    """An experiment's model, data set or setting cannot be used as it is.

    The text names the field, its value, what is allowed and what to do next; it is meant to be shown without a traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, ExitCode.CONFIGURATION)


class Interrupted(Exception):  # noqa: N818 - a request, not a fault
    """The worker was asked to stop while it waited."""
