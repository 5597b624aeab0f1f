"""The small vision transformer's patches."""

from __future__ import annotations

from typing import Any

import pytest

from worker.models.support import built


@pytest.mark.parametrize(("size", "patch"), [(4, 1), (8, 2), (28, 4), (32, 4), (48, 6), (64, 8), (224, 32)])
def test_patches_suit_the_image(size: int, patch: int) -> None:
    model: Any = built("vit", size=size)
    assert model.embed.kernel_size == (patch, patch)
    assert model.positions.shape[1] == (size // patch) ** 2
