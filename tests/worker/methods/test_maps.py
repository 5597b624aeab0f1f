"""The outputs of layers as maps."""

from __future__ import annotations

import torch
from torch import nn

from codistill_worker.methods.maps import as_map, pooled


def test_any_output_is_a_map() -> None:
    vector, tokens = torch.arange(6.0).view(2, 3), torch.arange(2 * 5 * 3.0).view(2, 5, 3)
    assert as_map(vector).shape == (2, 3, 1, 1)
    square = as_map(tokens)  # a class token and 2×2 patches
    assert square.shape == (2, 3, 2, 2)
    assert torch.equal(square[1, :, 1, 0], tokens[1, 3])
    assert torch.equal(as_map(tokens[:, 1:]), square)
    row = as_map(torch.ones(2, 7, 3))
    assert row.shape == (2, 3, 7, 1)
    maps = torch.randn(2, 3, 4, 4)
    assert as_map(maps) is maps
    assert torch.equal(as_map(maps.permute(0, 2, 3, 1)), maps)


def test_maps_are_pooled_to_eight_by_eight_at_most() -> None:
    maps = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(pooled(maps), nn.functional.avg_pool2d(maps, 2))
    assert torch.equal(pooled(maps[..., :5, :5]), maps[..., :5, :5])
    assert pooled(torch.ones(2, 50, 3)).shape == (2, 3, 7, 7)
