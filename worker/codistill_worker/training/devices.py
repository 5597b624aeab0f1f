"""How models run on their devices: kernels, memory layout, precision, threads, and copies of outputs to the CPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Mapping

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from codistill.config.training import Training
from codistill_worker.transfers import host_buffer

__all__ = ["forward_pass", "place_model", "set_kernels", "to_cpu"]

_CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
_DETERMINISTIC_CUBLAS = (":4096:8", ":16:8")  # the values with which cuBLAS gives the same bits on several streams


def set_kernels(training: Training) -> None:
    """Set this process to kernels that give the same bits each time, and to a participant's number of threads.

    Set again before each pass, as a user's module may set others while it is imported, and the participants of one process
    share them. Another number of threads sums in another order.

    Args:
        training: has the threads, and whether float32 may be rounded to TF32.
    """
    if torch.get_num_threads() != training.threads:
        torch.set_num_threads(training.threads)
    if os.environ.get(_CUBLAS_VARIABLE) not in _DETERMINISTIC_CUBLAS:
        os.environ[_CUBLAS_VARIABLE] = _DETERMINISTIC_CUBLAS[0]  # cuBLAS reads it when its first handle is made
    # As use_deterministic_algorithms(True, warn_only=True), without the import of the compiler, which takes seconds.
    torch.set_deterministic_debug_mode("warn")
    # Else that mode fills all new memory with NaN, which costs time and changes no number that is used.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    # The older names first: reading them fails where only the newer ones were set.
    torch.set_float32_matmul_precision("high" if training.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = training.tf32
    for operator in ("conv", "rnn"):
        newer = getattr(torch.backends.cudnn, operator, None)
        if newer is not None:
            newer.fp32_precision = "tf32" if training.tf32 else "ieee"


def place_model(model: nn.Module, device: torch.device, training: Training) -> nn.Module:
    """Return a model on its device, its weights in the memory layout that the experiment asks for."""
    layout = torch.channels_last if training.channels_last else torch.contiguous_format
    return model.to(device, memory_format=layout)  # pyright: ignore[reportCallIssue]


@contextlib.contextmanager
def forward_pass(device: torch.device, training: Training) -> Generator[None]:
    """Return the context of a forward pass: the experiment's precision, and attention that is the same each time.

    On a GPU the fused kernels of attention add up gradients in any order while others only have to warn of it. The choice
    is made here, in the forward pass. On a CPU they are deterministic.
    """
    with contextlib.ExitStack() as contexts:
        if training.precision == "bfloat16":
            contexts.enter_context(torch.autocast(device.type, dtype=torch.bfloat16))
        if device.type == "cuda":
            contexts.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def to_cpu(arrays: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Return arrays of a device on the CPU, without their gradients."""
    if device.type != "cuda":
        return {name: value.detach() for name, value in arrays.items()}
    copies: dict[str, torch.Tensor] = {}
    for name, value in arrays.items():
        # To page-locked memory the copy runs beside the device's other work; only its end is waited for.
        copies[name] = host_buffer(value.shape, value.dtype, device)
        copies[name].copy_(value.detach(), non_blocking=True)
    torch.cuda.current_stream(device).synchronize()
    return copies
