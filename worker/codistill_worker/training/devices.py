"""How models run on their devices: memory layout, precision, threads, and copies of outputs to the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
from torch import nn

from codistill.config.training import Training
from codistill_worker.transfers import host_buffer

__all__ = ["autocast", "place_model", "set_threads", "to_cpu"]


def place_model(model: nn.Module, device: torch.device, training: Training) -> nn.Module:
    """Return a model on its device, its weights in the memory layout that the experiment asks for."""
    layout = torch.channels_last if training.channels_last else torch.contiguous_format
    return model.to(device, memory_format=layout)  # pyright: ignore[reportCallIssue]


def autocast(device: torch.device, training: Training) -> contextlib.AbstractContextManager[object]:
    """Return the context of a forward pass in the experiment's precision."""
    if training.precision == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def set_threads(training: Training) -> None:
    """Set torch to a participant's number of threads, as another number sums in another order."""
    if torch.get_num_threads() != training.threads:
        torch.set_num_threads(training.threads)


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
