"""A small convolutional network."""

from __future__ import annotations

from torch import nn

from codistill_worker.models.arguments import Rate, Width

__all__ = ["cnn"]


def cnn(*, classes: int, channels: int, size: int, width: Width = 16, dropout: Rate = 0.0) -> nn.Module:
    """Return stages of a 3×3 convolution, batch normalisation and a rectifier, halving the image between two of them.

    There are three stages below 64×64 pixels and one more for each doubling from there, so that the last sees less
    than 16×16. The first has `width` channels, each next one twice as many, up to eight times. The last map's mean,
    after dropout, goes to one linear layer.
    """
    stages = 3
    while size >> (stages - 1) > 15:
        stages += 1
    layers: list[nn.Module] = []
    before = channels
    for stage in range(stages):
        after = width * 2 ** min(stage, 3)
        if stage and size >> stage:  # a map of one pixel cannot be halved
            layers.append(nn.MaxPool2d(2))
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        before = after
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(before, classes)
    )
