"""torchvision's networks, made for 224×224 pixels, fitted to images of at most 64×64.

Unchanged they halve a small image until one pixel is left, and learn little. The changes are those of public work on
CIFAR: the first convolution and the halvings that follow it. A 32×32 image is then a 4×4 map where the network ends (2×2
for patch-based networks, 1×1 for VGG). Everything after is torchvision's.

`STEMS` is the whole table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

__all__ = ["SMALL", "STEMS", "Stem", "fit", "set_channels"]

SMALL = 64
"""Images up to this height and width get a small-image stem."""

Stem = Callable[[Any, int], None]
"""Changes a model in place for images of a height and width."""


def fit(model: nn.Module, name: str, size: int) -> None:
    """Fit a torchvision model to images of `size`×`size` in place; larger images than `SMALL` need no change.

    Args:
        model: built by torchvision.
        name: its name in torchvision.
        size: height and width of the images.
    """
    if size <= SMALL:
        stem = next((stem for prefix, stem in STEMS.items() if name.startswith(prefix)), None)
        if stem is not None:
            stem(model, size)


def set_channels(model: nn.Module, channels: int) -> None:
    """Change a torchvision model in place, to take images of another number of channels than 3."""
    if channels == 3:
        return
    name, first = next((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    model.set_submodule(name, _convolution(first, in_channels=channels))


def _convolution(like: nn.Conv2d, **changes: Any) -> nn.Conv2d:
    """Return a new convolution that differs in some settings, initialised to keep the variance of its input."""
    settings: dict[str, Any] = {
        "in_channels": like.in_channels,
        "out_channels": like.out_channels,
        "kernel_size": like.kernel_size,
        "stride": like.stride,
        "padding": like.padding,
        "bias": like.bias is not None,
    }
    convolution = nn.Conv2d(**settings | changes)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_in", nonlinearity="relu")
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
    return convolution


def _resnet(model: Any, size: int) -> None:  # noqa: ARG001
    model.conv1 = _convolution(model.conv1, kernel_size=3, stride=1, padding=1)
    model.maxpool = nn.Identity()


def _shufflenet(model: Any, size: int) -> None:  # noqa: ARG001
    model.conv1[0].stride = (1, 1)
    model.maxpool = nn.Identity()


def _densenet(model: Any, size: int) -> None:  # noqa: ARG001
    model.features.conv0 = _convolution(model.features.conv0, kernel_size=3, stride=1, padding=1)
    model.features.pool0 = nn.Identity()


def _vgg(model: Any, size: int) -> None:
    """Drop the last halvings that an image under 32 pixels has no pixels for, and pool to 1×1 instead of 7×7."""
    pools = [index for index, layer in enumerate(model.features) if isinstance(layer, nn.MaxPool2d)]
    for index in pools[size.bit_length() - 1 :]:
        model.features[index] = nn.Identity()
    first = model.classifier[0]
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier[0] = nn.Linear(first.in_features // 49, first.out_features)
    nn.init.normal_(model.classifier[0].weight, 0, 0.01)
    nn.init.zeros_(model.classifier[0].bias)


def _alexnet(model: Any, size: int) -> None:  # noqa: ARG001
    """Make the first convolution 3×3 with stride 1, pool 2×2, and pool to 4×4 instead of 6×6 at the end."""
    model.features[0] = _convolution(model.features[0], kernel_size=3, stride=1, padding=1)
    for index, layer in enumerate(model.features):
        if isinstance(layer, nn.MaxPool2d):
            model.features[index] = nn.MaxPool2d(2)
    first = model.classifier[1]
    model.avgpool = nn.AdaptiveAvgPool2d(4)
    model.classifier[1] = nn.Linear(first.in_features // 36 * 16, first.out_features)


def _squeezenet(model: Any, size: int) -> None:  # noqa: ARG001
    model.features[0] = _convolution(model.features[0], kernel_size=3, stride=1, padding=1)


def _googlenet(model: Any, size: int) -> None:  # noqa: ARG001
    model.conv1.conv = _convolution(model.conv1.conv, kernel_size=3, stride=1, padding=1)
    model.maxpool1 = nn.Identity()


def _inception(model: Any, size: int) -> None:  # noqa: ARG001
    """Leave the three halvings out that come before the first inception block."""
    model.Conv2d_1a_3x3.conv.stride = (1, 1)
    model.maxpool1 = nn.Identity()
    model.maxpool2 = nn.Identity()


def _without_strides(model: Any, size: int, *, count: int) -> None:  # noqa: ARG001
    """Set the stride of the first `count` convolutions that have one to 1."""
    strided = [module for module in model.modules() if isinstance(module, nn.Conv2d) and module.stride != (1, 1)]
    for convolution in strided[:count]:
        convolution.stride = (1, 1)


def _patches(model: Any, size: int) -> None:
    """Cut 16 patches along a side instead of one every 4 pixels; as many as there are pixels in images under 32."""
    patch = max(1, size // 16)
    model.features[0][0] = _convolution(model.features[0][0], kernel_size=patch, stride=patch, padding=0)


STEMS: Mapping[str, Stem] = {
    "resnet": _resnet,  # conv1 3×3 with stride 1, no max-pooling
    "resnext": _resnet,
    "wide_resnet": _resnet,
    "densenet": _densenet,  # conv0 3×3 with stride 1, no max-pooling
    "vgg": _vgg,  # 1×1 instead of 7×7 before the classifier, whose widths stay
    "alexnet": _alexnet,  # first convolution 3×3 with stride 1, 2×2 pooling
    "squeezenet": _squeezenet,  # first convolution 3×3 with stride 1
    "shufflenet": _shufflenet,  # conv1 with stride 1, no max-pooling
    "googlenet": _googlenet,  # conv1 3×3 with stride 1, no first max-pooling
    "inception": _inception,  # conv 1a with stride 1, no max-pooling; still needs about 19 pixels
    "mobilenet": partial(_without_strides, count=2),  # stem and first strided block with stride 1
    "mnasnet": partial(_without_strides, count=2),
    "efficientnet": partial(_without_strides, count=2),
    "regnet": partial(_without_strides, count=3),  # the same: its first block has a strided shortcut too
    "convnext": _patches,  # patches of size/16 instead of 4
    "swin": _patches,
}
"""The change for each family, by the beginning of torchvision's name.

`vit` is built for the image's size by `external.py`; `maxvit` takes multiples of 224 pixels only.
"""
