"""Imports torchvision and timm on first use.

Both take seconds to import. torchvision's wheel from PyPI is built beside a CUDA build of torch. Beside a CPU build its
compiled operators cannot be loaded; its import fails, as it registers shape rules for two operators that were never declared.
Classification uses neither, so it is enough to declare their schemas.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from codistill_worker.errors import ConfigurationError

__all__ = ["timm", "torchvision"]

_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[torch.library.Library] = []  # a library's declarations last as long as its object


def torchvision() -> Any:
    """Return the module torchvision, imported.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        import torchvision as module
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        # Declared only now: where the compiled operators load, they declare themselves, and may do so only once.
        library = torch.library.Library("torchvision", "DEF")
        for name in _OPERATORS:
            library.define(name + _SCHEMA)
        _declared.append(library)
        for name in [name for name in sys.modules if name.startswith("torchvision.")]:
            del sys.modules[name]  # left over from the failed import, and incomplete
        import torchvision as module
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
