"""Copies between the host and a device for which the host does not wait more than it must."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

__all__ = ["all_finite", "host_buffer", "upload"]


def host_buffer(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return uninitialised memory on the CPU for copies from or to a device.

    The memory is page-locked for a CUDA device that is in use, as copies then run beside the device's other work. Page-locking
    needs CUDA's context, so no process that trains on the CPU asks for it.
    """
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda" and torch.cuda.is_initialized())


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return values of the CPU on a device, without waiting until a CUDA device has them.

    A copy from pageable memory would wait for all work that the device has queued. PyTorch keeps page-locked memory until
    the copies from it are over, so the staged values may be dropped at once.
    """
    if device.type != "cuda":
        return values.to(device)
    if not values.is_pinned():
        staged = host_buffer(values.shape, values.dtype, device)
        values = staged.copy_(values)
    return values.to(device, non_blocking=True)


def all_finite(values: torch.Tensor) -> bool:
    """Return whether no value on the CPU is infinite or NaN.

    The least and the greatest value are NaN if any is. One pass finds both, without a mask for all values.
    """
    if not values.numel():
        return True
    low, high = torch.aminmax(values)
    return math.isfinite(low) and math.isfinite(high)
