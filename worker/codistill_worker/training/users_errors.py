"""The errors of a user's model or method in training, as errors of the experiment."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from codistill.peer.errors import PeerError
from codistill.process import plugins
from codistill.process.plugins import LoadError
from codistill_worker.errors import ConfigurationError, is_devices_fault

__all__ = ["explained"]


@contextmanager
def explained(problem: str) -> Generator[None]:
    """Raise what a user's code raises as ConfigurationError; leave the device's errors and codistill's own.

    Args:
        problem: the text before the error, its line and its own text.
    """
    try:
        yield
    except (PeerError, LoadError):
        raise
    except (Exception, SystemExit) as error:
        if is_devices_fault(error):
            raise
        raise ConfigurationError(f"{problem}: {plugins.explain_error(error)}") from error
