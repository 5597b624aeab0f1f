"""A multi-layer perceptron on pixels."""

from __future__ import annotations

from torch import nn

from codistill_worker.models.arguments import Count, Rate, Width

__all__ = ["mlp"]


def mlp(
    *, classes: int, channels: int, size: int, hidden: Width = 128, depth: Count = 2, dropout: Rate = 0.0
) -> nn.Module:
    """Return a perceptron of `depth` hidden layers of `hidden` rectified units, each followed by dropout."""
    layers: list[nn.Module] = [nn.Flatten()]
    width = channels * size * size
    for _ in range(depth):
        layers += [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout)]
        width = hidden
    return nn.Sequential(*layers, nn.Linear(width, classes))
