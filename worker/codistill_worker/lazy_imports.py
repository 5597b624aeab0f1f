"""Imports torchvision and timm on first use, as both take seconds to import."""

from __future__ import annotations

from typing import Any

from codistill.process.torchvision_operators import declare_missing_operators
from codistill_worker.errors import ConfigurationError

__all__ = ["timm", "torchvision"]


def torchvision() -> Any:
    """Return the module torchvision, imported.

    Raises:
        ConfigurationError: it is not installed.
    """
    declare_missing_operators()
    try:
        import torchvision as module
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    return module


def timm() -> Any:
    """Return the module timm, imported.

    Raises:
        ConfigurationError: it is not installed.
    """
    torchvision()
    try:
        import timm as module
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    return module


def _missing(error: ModuleNotFoundError) -> ConfigurationError:
    return ConfigurationError(f"{error.name} is not installed; install it with: pip install 'codistill[worker]'")
