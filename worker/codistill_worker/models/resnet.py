"""Residual networks for small images: CIFAR's ResNets and wide ResNets."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from codistill_worker.errors import ConfigurationError
from codistill_worker.models.arguments import Count, Rate, Width

__all__ = ["resnet", "wide_resnet"]


def resnet(*, classes: int, channels: int, size: int, depth: Count, width: Width = 16) -> nn.Module:  # noqa: ARG001
    """Return a CIFAR ResNet (He et al. 2016, 'Deep residual learning', section 4.2).

    A 3×3 convolution, three stages of (depth−2)/6 blocks with `width`, 2·`width` and 4·`width` channels, the mean of
    the last map and one linear layer. Shortcuts have no parameters ('option A'): where a stage begins they take every
    second pixel and fill the new channels with zeros.

    Args:
        classes: outputs.
        channels: of an image.
        size: height and width of an image; any.
        depth: layers with weights, 6n+2.
        width: channels of the first stage.
    """
    blocks = (depth - 2) // 6
    widths = [width, 2 * width, 4 * width]
    stages: list[nn.Module] = []
    before = width
    for stage, after in enumerate(widths):
        for block in range(blocks):
            stages.append(_Block(before, after, 2 if stage and not block else 1))
            before = after
    return _initialised(
        nn.Sequential(
            _convolution(channels, width, 3),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            *stages,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(before, classes),
        )
    )


def wide_resnet(
    *,
    classes: int,
    channels: int,
    size: int,  # noqa: ARG001
    depth: Count = 16,
    width: Width = 2,
    dropout: Rate = 0.0,
) -> nn.Module:
    """Return a wide ResNet (Zagoruyko & Komodakis 2016, 'Wide residual networks', table 1), WRN-`depth`-`width`.

    Args:
        classes: outputs.
        channels: of an image.
        size: height and width of an image; any.
        depth: layers with weights, 6n+4.
        width: how many times 16, 32 and 64 channels the three stages have.
        dropout: between the two convolutions of a block.

    Raises:
        ConfigurationError: the depth is not 6n+4.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ConfigurationError(f"model_args.depth: {depth} is not 6n+4; allowed: 10, 16, 22, 28, 34, 40, …")
    stages: list[nn.Module] = []
    before = 16
    for stage, after in enumerate((16 * width, 32 * width, 64 * width)):
        for block in range((depth - 4) // 6):
            stages.append(_WideBlock(before, after, 2 if stage and not block else 1, dropout))
            before = after
    return _initialised(
        nn.Sequential(
            _convolution(channels, 16, 3),
            *stages,
            nn.BatchNorm2d(before),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(before, classes),
        )
    )


class _Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = _convolution(before, after, 3, stride)
        self.first_norm = nn.BatchNorm2d(after)
        self.second = _convolution(after, after, 3)
        self.second_norm = nn.BatchNorm2d(after)
        self.stride = stride
        self.new_channels = after - before

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        shortcut = images
        if self.stride > 1:
            shortcut = shortcut[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            ahead = self.new_channels // 2
            shortcut = functional.pad(shortcut, (0, 0, 0, 0, ahead, self.new_channels - ahead))
        inner = functional.relu(self.first_norm(self.first(images)), inplace=True)
        return functional.relu(self.second_norm(self.second(inner)) + shortcut, inplace=True)


class _WideBlock(nn.Module):
    """Normalisation and rectifier come before each convolution; a shortcut that changes shape is a 1×1 convolution."""

    def __init__(self, before: int, after: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.first_norm = nn.BatchNorm2d(before)
        self.first = _convolution(before, after, 3, stride)
        self.second_norm = nn.BatchNorm2d(after)
        self.dropout = nn.Dropout(dropout)
        self.second = _convolution(after, after, 3)
        self.shortcut = _convolution(before, after, 1, stride) if before != after or stride > 1 else None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        activated = functional.relu(self.first_norm(images), inplace=True)
        shortcut = self.shortcut(activated) if self.shortcut is not None else images
        inner = functional.relu(self.second_norm(self.first(activated)), inplace=True)
        return self.second(self.dropout(inner)) + shortcut


def _convolution(before: int, after: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)


def _initialised(model: nn.Module) -> nn.Module:
    """Return the model with its convolutions initialised after He et al. 2015, as both papers ask."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
