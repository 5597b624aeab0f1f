"""Loading a user's model or data: :mod:`codistill.process.plugins`, with a worker's errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from codistill.process import plugins
from codistill.process.plugins import LoadError, accepted, is_reference, some
from codistill_worker.errors import ConfigurationError

__all__ = ["accepted", "explained", "is_reference", "load", "some"]

_HERE = str(Path(__file__).parent)


def load(reference: str, field: str) -> Callable[..., Any]:
    """Imports a callable by its name, as :func:`codistill.process.plugins.load`.

    Raises:
        ConfigurationError: it cannot be imported.
    """
    try:
        return plugins.load(reference, field)
    except LoadError as error:
        raise ConfigurationError(str(error)) from error.__cause__


def explained(error: BaseException) -> str:
    """Returns an error of a user's code as one line: what it is, and at which line of the user's it was raised."""
    return plugins.explained(error, (_HERE,))
