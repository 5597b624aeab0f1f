"""Residual networks, as large and as deep as published."""

from __future__ import annotations

import pytest
from torch import nn

from codistill_worker.models import builtin_names
from worker.models.support import built, parameters


@pytest.mark.parametrize(
    ("name", "millions"),
    [  # tables of He et al. 2016 (section 4.2, table 6) and of Zagoruyko & Komodakis 2016
        ("resnet20", 0.27),
        ("resnet32", 0.46),
        ("resnet44", 0.66),
        ("resnet56", 0.85),
        ("resnet110", 1.7),
        ("wrn16_2", 0.7),
        ("wrn40_2", 2.2),
        ("wrn28_10", 36.5),
    ],
)
def test_residual_networks_are_as_large_as_published(name: str, millions: float) -> None:
    assert parameters(built(name)) / 1e6 == pytest.approx(millions, abs=0.06)


def test_residual_networks_are_as_deep_as_their_names_say() -> None:
    for name in builtin_names():
        if name.startswith("resnet"):
            layers = [each for each in built(name, size=8).modules() if isinstance(each, nn.Conv2d | nn.Linear)]
            assert len(layers) == int(name.removeprefix("resnet"))
