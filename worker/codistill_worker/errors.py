"""The worker's errors, and how to tell those of memory and device.

PeerError                ends a worker, and has its exit code (codistill.peer.errors)
└── ConfigurationError   an experiment's model, data set or checkpoint cannot be used as it is
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from codistill.peer.errors import PeerError
from codistill.process.exit_codes import ExitCode
from codistill.process.plugins import users_code

__all__ = ["ConfigurationError", "is_devices_fault", "is_out_of_memory", "refuse_exit"]

# On a CPU, PyTorch raises a plain RuntimeError; its text depends on the system.
_TEXTS = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
_OF_GPUS = ("CUDA error", "CUDA driver error", "cuDNN error", "NCCL error")


class ConfigurationError(PeerError, ValueError):
    """An experiment's model, data set or setting cannot be used as it is.

    The text names the field, its value, the allowed values and the next step; it is shown without a traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, ExitCode.CONFIGURATION)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on the device or in the machine."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)


def refuse_exit(participant: str) -> AbstractContextManager[None]:
    """Return a context in which a user's code that ends the process, whatever it raises to do so, raises a LoadError.

    Args:
        participant: begins the error's text: "student 'a'".
    """
    return users_code(participant, spare=lambda error: isinstance(error, Exception))


def is_devices_fault(error: BaseException) -> bool:
    """Return whether an error is the device's, or one of its memory, so that another try may succeed."""
    return is_out_of_memory(error) or (isinstance(error, RuntimeError) and str(error).startswith(_OF_GPUS))
