"""Weights as torchvision publishes them, under the names that its models have here.

Two kinds of file have other names than the model that they are for: those of DenseNet, which are older than its code,
and those with auxiliary classifiers, which the models here are built without.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

__all__ = ["rename_keys"]

_AUXILIARY = {"torchvision:googlenet": ("aux1.", "aux2."), "torchvision:inception_v3": ("AuxLogits.",)}
_NUMBERED = re.compile(r"(\.denselayer\d+\.(?:norm|conv))\.(?=[12]\.)")


def rename_keys(weights: Mapping[str, Tensor], reference: str) -> Mapping[str, Tensor]:
    """Returns a model's weights under its own names; of most models, the very mapping that is given.

    Args:
        weights: by the names that the file has.
        reference: the model's, as in the experiment.
    """
    if reference in _AUXILIARY:
        return {name: value for name, value in weights.items() if not name.startswith(_AUXILIARY[reference])}
    if reference.startswith("torchvision:densenet"):  # layers were numbered as norm.1, and are norm1
        return {_NUMBERED.sub(r"\1", name): value for name, value in weights.items()}
    return weights
