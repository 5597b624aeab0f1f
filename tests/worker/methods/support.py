"""Models whose hidden layers the tests read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from codistill_worker import models

MODELS = {
    "mlp": ("mlp", {"dropout": 0.3}, 8),
    "cnn": ("cnn", {"dropout": 0.3}, 8),
    "vit": ("vit", {"dropout": 0.3}, 8),
    "resnet8": ("resnet8", {}, 8),
    "wrn16_1": ("wrn16_1", {}, 8),
    "torchvision": ("torchvision:mobilenet_v2", {}, 32),
    "timm": ("timm:resnet18", {"drop_rate": 0.3}, 32),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads on a busy machine wait for one another longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def built(name: str) -> tuple[nn.Module, int]:
    reference, args, size = MODELS[name]
    return models.build(reference, classes=10, channels=1, size=size, args=args, seed=0), size
