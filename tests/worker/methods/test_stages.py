"""Layers that divide a model's depth."""

from __future__ import annotations

import pytest

from codistill_worker.errors import ConfigurationError
from codistill_worker.methods.stages import stage_layers
from codistill_worker.methods.tracing import TracedModel
from worker.methods.support import built


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("mlp", ("3", "6")),  # 1 and 2 of 3 layers, each after its dropout
        ("cnn", ("3", "10")),  # 1 and 3 of 4, the last before pixels are averaged
        ("resnet8", ("3", "4")),  # 3 and 5 of 8
        ("wrn16_1", ("2", "4")),
        ("vit", ("blocks.0", "norm")),
        ("torchvision", ("features.6", "features.12")),
        ("timm", ("layer2.0", "layer3.0")),
    ],
)
def test_stages_divide_the_depth_evenly(name: str, layers: tuple[str, ...]) -> None:
    model, size = built(name)
    assert stage_layers(model, 2, channels=1, size=size) == layers
    TracedModel(model, layers)  # refuses layers that cannot be read


def test_more_stages_than_a_model_has_are_refused() -> None:
    model, size = built("mlp")
    with pytest.raises(ConfigurationError, match=r"^the model has 2 hidden layers in its trunk, 3 are needed; name "):
        stage_layers(model, 3, channels=1, size=size)
