"""The outputs of layers as maps, [B, channels, height, width], whatever shape a model gives them."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional

__all__ = ["as_map", "pooled"]

_LARGEST = 8


def as_map(output: Tensor) -> Tensor:
    """Return a layer's output as [B, channels, height, width].

    Tokens are laid out as the square that they were cut from, without the class token before them. If their number has no
    integer root, they are a map of N×1. A vector is a map of 1×1. Maps of square images are square, so the other side has
    the channels.

    Args:
        output: [B, D], [B, N, D], [B, channels, height, width] or [B, height, width, channels].
    """
    if output.ndim == 2:
        return output[:, :, None, None]
    if output.ndim == 4:
        _, first, second, third = output.shape
        return output.permute(0, 3, 1, 2) if first == second != third else output
    tokens = output.shape[1]
    side = math.isqrt(tokens)
    if side and side**2 in (tokens, tokens - 1):
        return output[:, tokens - side**2 :].transpose(1, 2).unflatten(2, (side, side))
    return output.transpose(1, 2)[..., None]


def pooled(output: Tensor) -> Tensor:
    """Return a layer's output as a map of at most 8×8; larger ones are averaged over patches.

    Args:
        output: of a shape that :func:`as_map` takes.
    """
    maps = as_map(output)
    height, width = maps.shape[2:]
    return functional.adaptive_avg_pool2d(maps, (min(height, _LARGEST), min(width, _LARGEST)))
