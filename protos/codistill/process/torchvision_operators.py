"""Lets torchvision be imported where its compiled operators cannot be loaded.

torchvision's wheel from PyPI is built beside a CUDA build of torch. Beside a CPU build its operators cannot be loaded, and its
import fails, as it registers shape rules for two that were never declared. Classification uses neither, so it is enough to
declare their schemas.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import sys
import threading
from pathlib import Path
from typing import Any

__all__ = ["declare_missing_operators"]

_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[Any] = []  # a library's declarations last as long as its object
_lock = threading.Lock()


def declare_missing_operators() -> None:
    """Declare the operators that torchvision's import needs and its compiled library does not bring.

    Does nothing where torchvision or torch is not installed, or torchvision is imported already. It imports torch, and not
    torchvision.
    """
    with _lock:
        if _declared or "torchvision" in sys.modules:
            return
        spec = importlib.util.find_spec("torchvision")
        if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("torch") is None:
            return
        import torch

        suffixes = (*importlib.machinery.EXTENSION_SUFFIXES, ".so")
        folder = Path(spec.submodule_search_locations[0])
        library = next((path for suffix in suffixes if (path := folder / f"_C{suffix}").is_file()), None)
        if library is not None:
            # torchvision loads it in the same way later; for the system, both are one.
            with contextlib.suppress(OSError, RuntimeError):
                torch.ops.load_library(library)
        if hasattr(torch.ops.torchvision, _OPERATORS[0]):
            return
        made = torch.library.Library("torchvision", "FRAGMENT")
        for name in _OPERATORS:
            made.define(name + _SCHEMA)
        _declared.append(made)
        for name in [name for name in sys.modules if name.startswith("torchvision.")]:
            del sys.modules[name]  # left over from an import that failed, and incomplete
