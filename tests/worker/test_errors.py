"""Which errors are the device's, which are of memory, and how a process ends with them."""

from __future__ import annotations

import errno
from typing import Any

import pytest
import torch

from codistill.peer.errors import PeerError
from codistill.process.exit_codes import ExitCode
from codistill.process.plugins import LoadError
from codistill_worker.errors import ConfigurationError, is_devices_fault, is_out_of_memory, participants_errors

GPU = torch.device("cuda", 1)
_MORE = "\nCUDA kernel errors might be asynchronously reported at some other API call\nCompile with TORCH_USE_CUDA_DSA"


class DriverError(RuntimeError):
    """Stands for `torch.AcceleratorError`, which only PyTorch makes, and which older versions lack."""

    def __init__(self, text: str, error_code: Any = None) -> None:
        super().__init__(text)
        self.error_code = error_code


OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 15.78 GiB total capacity)"),
    RuntimeError(f"CUDA error: out of memory{_MORE}"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("HIP error: out of memory"),
    RuntimeError("Caught RuntimeError in replica 0 on device 0.\nTraceback:\nRuntimeError: CUDA error: out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("unable to mmap 4096 bytes from file </x>: Cannot allocate memory (12)"),
    DriverError("CUDA error: out of memory", 2),
    DriverError("another text of the driver", 2),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    MemoryError(),
]
OF_THE_DEVICE = [
    RuntimeError(f"CUDA error: device-side assert triggered{_MORE}"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: unspecified launch failure"),
    RuntimeError("CUDA error: uncorrectable ECC error encountered"),
    RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa, opb)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("CUDA driver error: invalid argument"),
    RuntimeError("CUDA unknown error - this may be due to an incorrectly set up environment"),
    RuntimeError("NCCL Error 1: unhandled cuda error; NCCL error in: x.cpp:5"),
    RuntimeError("Caught RuntimeError in replica 0.\nTraceback:\nRuntimeError: CUDA error: an illegal memory access"),
    DriverError("CUDA error: device-side assert triggered", 710),
    DriverError("another text of the driver", 719),
    DriverError("a driver without a number"),
]
OTHERS = [
    ValueError("CUDA error: out of memory, says a user's ValueError"),
    RuntimeError("the buffer of my model is out of memory slots"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (8x64 and 32x10)"),
    OSError(errno.ENOSPC, "No space left on device"),
    ConfigurationError("model: cannot be built"),
    PeerError("CUDA error: out of memory, of another worker", ExitCode.GAVE_UP),
]


@pytest.fixture(autouse=True)
def drivers_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "AcceleratorError", DriverError, raising=False)


@pytest.mark.parametrize("error", OF_MEMORY, ids=repr)
def test_memory_that_ran_out_has_its_code(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert is_devices_fault(error)
    with pytest.raises(PeerError) as caught, participants_errors("student 'a'", GPU, lambda: 7):
        raise error
    assert caught.value.code is ExitCode.OUT_OF_MEMORY
    assert caught.value.__cause__ is error
    text = str(caught.value)
    assert text.startswith("student 'a' ran out of memory on cuda:1: ")
    assert "lower training.batch_size" in text
    assert "\n" not in text
    assert "Traceback" not in text


@pytest.mark.parametrize("error", OF_THE_DEVICE, ids=repr)
def test_a_device_that_failed_has_its_code(error: Exception) -> None:
    assert not is_out_of_memory(error)
    assert is_devices_fault(error)
    with pytest.raises(PeerError) as caught, participants_errors("student 'a'", GPU, lambda: 7):
        raise error
    assert caught.value.code is ExitCode.DEVICE_FAILED
    text = str(caught.value)
    assert text.startswith("student 'a' can no longer use cuda:1 in step 7: ")
    assert "\n" not in text
    assert "Traceback" not in text


@pytest.mark.parametrize("error", OTHERS, ids=repr)
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    assert not is_out_of_memory(error)
    assert not is_devices_fault(error)
    with pytest.raises(type(error)) as caught, participants_errors("student 'a'", GPU):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("error", "code"),
    [(OF_MEMORY[2], ExitCode.OUT_OF_MEMORY), (OF_THE_DEVICE[1], ExitCode.DEVICE_FAILED)],
)
def test_a_users_error_raised_from_the_devices(error: Exception, code: ExitCode) -> None:
    with pytest.raises(PeerError, match="CUDA error: ") as caught, participants_errors("student 'a'", GPU):
        raise ValueError("my model failed") from error
    assert caught.value.code is code
    assert " in step " not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        (
            "CUDA error: device-side assert triggered",
            "an index outside its tensor most often: set training.device: cpu",
        ),
        ("CUDA error: no kernel image is available for execution on the device", "install one that has"),
        ("CUDA error: unspecified launch failure", "look at `nvidia-smi -q`"),
    ],
)
def test_the_error_says_what_to_do(text: str, hint: str) -> None:
    with pytest.raises(PeerError, match=hint), participants_errors("student 'a'", GPU):
        raise RuntimeError(text)


def test_code_that_ends_the_process_is_still_refused() -> None:
    with pytest.raises(LoadError, match="student 'a': it ended the process"), participants_errors("student 'a'", GPU):
        raise SystemExit(0)
