"""Tensors on the wire: dtype, shape and little-endian bytes, never pickle.

Example:
    >>> import torch
    >>> message = encode(torch.tensor([[1.0, -2.0]]), "float16")
    >>> decode(message)
    tensor([[ 1., -2.]], dtype=torch.float16)
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from codistill.v1 import distillation_pb2 as pb

__all__ = ["MAX_DIMENSIONS", "TensorError", "check", "decode", "encode", "encoded_size"]

MAX_DIMENSIONS = 8

_DTYPES: Mapping[str, tuple[pb.Dtype.ValueType, torch.dtype]] = {
    "float32": (pb.DTYPE_FLOAT32, torch.float32),
    "float16": (pb.DTYPE_FLOAT16, torch.float16),
    "bfloat16": (pb.DTYPE_BFLOAT16, torch.bfloat16),
    "int64": (pb.DTYPE_INT64, torch.int64),
}
# Far above any message; an empty tensor may still name sizes whose strides would overflow.
_MAX_ELEMENTS = 2**40
_NAMES = {dtype_id: name for name, (dtype_id, _) in _DTYPES.items()}


class TensorError(ValueError):
    """A tensor message that is not allowed; the text names the field, the value and what is allowed."""


def encode(tensor: torch.Tensor, dtype: str) -> pb.Tensor:
    """Encode a tensor.

    Args:
        tensor: on any device, with at most :data:`MAX_DIMENSIONS` dimensions; copied to the CPU if need be.
        dtype: "float32", "float16", "bfloat16" or "int64". Finite values beyond the range of a narrower floating-point
            dtype (±65504 for float16) are clamped to it. So no finite logit becomes infinite on the way.

    Raises:
        TensorError: the dtype is unknown, or there are more than :data:`MAX_DIMENSIONS` dimensions.
    """
    if dtype not in _DTYPES:
        raise TensorError(f"dtype {dtype!r} is not allowed; allowed: {', '.join(_DTYPES)}")
    dtype_id, target = _DTYPES[dtype]
    if tensor.dim() > MAX_DIMENSIONS:
        raise TensorError(f"shape: {tensor.dim()} dimensions; allowed are at most {MAX_DIMENSIONS}")
    value = tensor.detach().to("cpu")
    if target.is_floating_point and value.dtype is not target:
        # The limit must be exact in the dtype that is clamped: in bfloat16, 65504 would round up to 65536.
        value = value if value.dtype is torch.float64 else value.float()
        limit = torch.finfo(target).max
        value = torch.where(value.isinf(), value, value.clamp(-limit, limit))
    value = value.to(target).contiguous()
    raw = value.reshape(-1).view(torch.uint8).numpy()
    if sys.byteorder == "big":
        raw = raw.reshape(-1, value.element_size())[:, ::-1]
    return pb.Tensor(dtype=dtype_id, shape=tuple(value.shape), data=raw.tobytes())


def check(
    message: pb.Tensor, field: str, *, dtype: str | None = None, shape: Sequence[int | None] | None = None
) -> None:
    """Validate a message before allocating anything from it.

    Args:
        message: the message that arrived.
        field: its name, for errors.
        dtype: the dtype it must have, or None for any.
        shape: the shape it must have, with None for any size; or None for any shape.

    Raises:
        TensorError: dtype, shape or length are not allowed.
    """
    name = _NAMES.get(message.dtype)
    if name is None:
        given = f"{message.dtype} is not allowed" if message.dtype else "none is given"
        raise TensorError(f"{field}.dtype: {given}; allowed: {dtype or ', '.join(_DTYPES)}")
    if dtype is not None and name != dtype:
        raise TensorError(f"{field}.dtype: {name} is not allowed; this run's experiment asks for {dtype}")
    sizes = tuple(message.shape)
    if len(sizes) > MAX_DIMENSIONS:
        raise TensorError(f"{field}.shape: {len(sizes)} dimensions; allowed are at most {MAX_DIMENSIONS}")
    if shape is not None and (
        len(sizes) != len(shape) or any(want not in (None, have) for have, want in zip(sizes, shape, strict=True))
    ):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise TensorError(f"{field}.shape: {list(sizes)} is not allowed; expected [{wanted}]")
    if math.prod(max(size, 1) for size in sizes) > _MAX_ELEMENTS:
        raise TensorError(f"{field}.shape: {list(sizes)} is too large; allowed are at most 2**40 elements")
    size = math.prod(sizes) * _DTYPES[name][1].itemsize
    if len(message.data) != size:
        raise TensorError(f"{field}.data: {len(message.data)} bytes; {name} of shape {list(sizes)} takes {size}")


def decode(message: pb.Tensor, field: str = "tensor") -> torch.Tensor:
    """Decode a message into a new CPU tensor of its shape and dtype.

    Args:
        message: the message that arrived.
        field: its name, for errors.

    Raises:
        TensorError: as :func:`check`.
    """
    check(message, field)
    dtype = _DTYPES[_NAMES[message.dtype]][1]
    # Torch aligns the copy. Kernels may sum in another order on memory of another alignment, and a target must have the
    # same bits wherever it is computed.
    value = torch.empty(tuple(message.shape), dtype=dtype)
    raw = value.reshape(-1).view(torch.uint8).numpy()
    raw[:] = np.frombuffer(message.data, dtype=np.uint8)
    if sys.byteorder == "big":
        raw[:] = raw.reshape(-1, dtype.itemsize)[:, ::-1].reshape(-1)
    return value


def encoded_size(shape: Sequence[int], dtype: str) -> int:
    """Return an upper bound on the bytes of an encoded tensor."""
    return math.prod(shape) * _DTYPES[dtype][1].itemsize + 16 + 6 * len(shape)
