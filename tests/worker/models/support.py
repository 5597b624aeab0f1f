"""Models of the tests, built by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from codistill_worker.models import build


def built(
    reference: str, classes: int = 10, channels: int = 3, size: int = 32, seed: int = 0, **args: Any
) -> nn.Module:
    return build(reference, classes=classes, channels=channels, size=size, args=args, seed=seed)


def parameters(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads on a busy machine wait for one another longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
