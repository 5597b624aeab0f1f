"""The worker's errors, and how to tell those of memory and device.

PeerError                ends a worker, and has its exit code (codistill.peer.errors)
└── ConfigurationError   an experiment's model, data set or checkpoint cannot be used as it is
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Callable, Generator

import torch

from codistill.peer.errors import PeerError
from codistill.process.exit_codes import ExitCode
from codistill.process.plugins import users_code

__all__ = ["ConfigurationError", "is_devices_fault", "is_out_of_memory", "participants_errors", "refuse_exit"]

# PyTorch raises a RuntimeError with the text of the allocator, the driver or the library that failed. It may stand behind
# a prefix, where a thread, a replica or a compiler passes it on.
_OF_DEVICES = re.compile(
    r"\b(?:CUDA|HIP|XPU)(?: driver| unknown)? error\b|\b(?:cuDNN|MIOpen|cuBLAS|cuSOLVER|cuSPARSE|cuFFT|NCCL|NVRTC) error\b"
    r"|\b(?:CU[A-Z]+|HIP[A-Z]+)_STATUS_[A-Z_]+"
)
_OF_MEMORY = re.compile(
    r"DefaultCPUAllocator: (?:can't allocate|not enough) memory|\bCannot allocate memory\b"
    r"|\b(?:CUDA|HIP|XPU|MPS backend) out of memory\b|\b(?:CUDA|HIP|XPU)(?: driver)? error: .*\bout of memory\b"
    r"|\b(?:CU[A-Z]+|HIP[A-Z]+|MIOPEN)_\w*ALLOC(?:ATION)?_FAILED\b"
)
_MEMORY_ALLOCATION = 2  # cudaErrorMemoryAllocation
_HINTS = {
    "device-side assert": (
        "an index outside its tensor most often: set training.device: cpu, which names the line, or the environment's "
        "CUDA_LAUNCH_BLOCKING=1"
    ),
    "no kernel image": "this build of PyTorch has no kernels for this GPU: install one that has",
}
_HINT = "a new process may succeed; if this comes back, look at `nvidia-smi -q` and for Xid in the kernel's log"


class ConfigurationError(PeerError, ValueError):
    """An experiment's model, data set or setting cannot be used as it is.

    The text names the field, its value, the allowed values and the next step; it is shown without a traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, ExitCode.CONFIGURATION)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on the device or in the machine."""
    return any(map(_is_of_memory, _causes(error)))


def is_devices_fault(error: BaseException) -> bool:
    """Return whether an error is the device's, or one of memory, so that it says nothing of the user's code or files."""
    return any(_is_of_memory(each) or _is_of_device(each) for each in _causes(error))


def refuse_exit(participant: str) -> contextlib.AbstractContextManager[None]:
    """Return a context in which a user's code that ends the process, whatever it raises to do so, raises a LoadError.

    Args:
        participant: begins the error's text: "student 'a'".
    """
    return users_code(participant, spare=lambda error: isinstance(error, Exception))


@contextlib.contextmanager
def participants_errors(title: str, device: torch.device, step: Callable[[], int] | None = None) -> Generator[None]:
    """Raise the errors of a participant's device, and a user's code that ends the process, with their exit codes.

    After most errors of a GPU its process cannot use it any more. So nothing is tried again here; a new process is.

    Args:
        title: the participant's name for people: "student 'a'".
        device: what it runs on.
        step: returns the step under way, once there are any.

    Raises:
        PeerError: the device failed, with DEVICE_FAILED, or memory ran out, with OUT_OF_MEMORY.
        LoadError: the user's code ended the process.
    """
    try:
        with refuse_exit(title):
            yield
    except PeerError:
        raise
    except Exception as error:
        for each in _causes(error):
            if _is_of_memory(each):
                raise PeerError(
                    f"{title} ran out of memory on {device}: {_line_of(each, _OF_MEMORY)}; lower training.batch_size, or "
                    "set training.precision: bfloat16",
                    ExitCode.OUT_OF_MEMORY,
                ) from error
            if _is_of_device(each):
                line = _line_of(each, _OF_DEVICES)
                hint = next((hint for text, hint in _HINTS.items() if text in line), _HINT)
                place = "" if step is None else f" in step {step()}"
                raise PeerError(
                    f"{title} can no longer use {device}{place}: {line}; {hint}", ExitCode.DEVICE_FAILED
                ) from error
        raise


def _is_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return _is_torchs(error) and (_driver_code(error) == _MEMORY_ALLOCATION or bool(_OF_MEMORY.search(str(error))))


def _is_of_device(error: BaseException) -> bool:
    return _is_torchs(error) and (_driver_code(error) is not None or bool(_OF_DEVICES.search(str(error))))


def _causes(error: BaseException) -> Generator[BaseException]:
    """Yield an error and the errors that it was raised from. A user's code may raise its own from torch's."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__


def _is_torchs(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and not isinstance(error, PeerError)


def _driver_code(error: BaseException) -> int | None:
    """Return the driver's number of an error, -1 where it has none, and None for an error of another type.

    The type is not in every version of PyTorch that is allowed.
    """
    accelerator_error = getattr(torch, "AcceleratorError", None)
    if accelerator_error is None or not isinstance(error, accelerator_error):
        return None
    code = getattr(error, "error_code", None)
    return code if isinstance(code, int) else -1


def _line_of(error: BaseException, pattern: re.Pattern[str]) -> str:
    """Return the line of an error's text that a pattern matches, or its first line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line.strip() for line in lines if pattern.search(line)), lines[0])
