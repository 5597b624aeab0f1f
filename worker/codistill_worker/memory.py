"""Whether an error is a lack of memory: that of the device, of the machine, or what a limit of the system allows."""

from __future__ import annotations

import torch

__all__ = ["ran_out"]

# On a CPU, PyTorch raises a plain RuntimeError; its text depends on the system.
_TEXTS = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")


def ran_out(error: BaseException) -> bool:
    """Returns whether an error says that there was not enough memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)
