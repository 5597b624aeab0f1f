"""torchvision's networks, fitted to small images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from codistill_worker.lazy_imports import torchvision
from codistill_worker.models.stems import STEMS
from worker.models.support import built


def final_map(model: nn.Module, size: int, channels: int = 3) -> tuple[int, int]:
    """Return height and width of the last activation that still has both."""
    shapes: list[torch.Size] = []
    handles = [
        each.register_forward_hook(lambda _module, _inputs, output: shapes.append(output.shape))
        for each in model.modules()
        if isinstance(each, nn.Conv2d)
    ]
    model.eval()
    with torch.no_grad():
        model(torch.zeros(1, channels, size, size))
    for handle in handles:
        handle.remove()
    return shapes[-1][2], shapes[-1][3]


@pytest.mark.parametrize(
    ("name", "size", "last"),
    [
        ("resnet18", 32, 4),
        ("resnet18", 64, 8),
        ("resnet18", 65, 3),  # beyond 64 as published
        ("densenet121", 32, 4),
        ("vgg11", 8, 1),
        ("alexnet", 32, 8),
        ("alexnet", 8, 2),
        ("squeezenet1_1", 32, 4),
        ("shufflenet_v2_x0_5", 32, 4),
        ("googlenet", 32, 4),
        ("mobilenet_v2", 32, 4),
        ("mobilenet_v3_small", 32, 4),
        ("mnasnet0_5", 32, 4),
        ("efficientnet_b0", 32, 4),
        ("regnet_x_400mf", 32, 4),
        ("convnext_tiny", 32, 2),
    ],
)
def test_small_images_are_halved_no_further_than_they_bear(name: str, size: int, last: int) -> None:
    assert final_map(built(f"torchvision:{name}", size=size), size) == (last, last)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 8),
        ("resnext50_32x4d", 28),
        ("wide_resnet50_2", 8),
        ("densenet121", 8),
        ("inception_v3", 28),
        ("efficientnet_v2_s", 8),
        ("regnet_y_400mf", 8),
        ("convnext_tiny", 8),
        ("swin_t", 28),
    ],
)
def test_small_grey_images_are_taken(name: str, size: int) -> None:
    model = built(f"torchvision:{name}", 5, 1, size)
    assert model(torch.randn(2, 1, size, size)).shape == (2, 5)  # one tensor in training too


def test_every_family_has_a_stem() -> None:
    module = torchvision()
    families = set(module.models.list_models(module=module.models))
    bare = {name for name in families if not name.startswith(tuple(STEMS))}
    assert bare == {"maxvit_t", "vit_b_16", "vit_b_32", "vit_h_14", "vit_l_16", "vit_l_32"}


def test_vgg_keeps_its_classifier() -> None:
    model: Any = built("torchvision:vgg11_bn", classes=100)
    assert final_map(model, 32) == (2, 2)  # and pooled once more
    assert [each.out_features for each in model.classifier if isinstance(each, nn.Linear)] == [4096, 4096, 100]
    assert model.classifier[0].in_features == 512
