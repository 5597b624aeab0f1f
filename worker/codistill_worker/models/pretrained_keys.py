"""Renames the keys of torchvision's published weights to those of its models.

Two kinds of file have other keys than their model. Those of DenseNet are older than its code. Others hold auxiliary
classifiers, which the models here are built without.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

__all__ = ["rename_keys"]

_AUXILIARY = {"torchvision:googlenet": ("aux1.", "aux2."), "torchvision:inception_v3": ("AuxLogits.",)}
_NUMBERED = re.compile(r"(\.denselayer\d+\.(?:norm|conv))\.(?=[12]\.)")


def rename_keys(weights: Mapping[str, Tensor], reference: str) -> Mapping[str, Tensor]:
    """Return weights by the names of their model; for most models, the mapping itself.

    Args:
        weights: by the names in the file.
        reference: the model, as in the experiment.
    """
    if reference in _AUXILIARY:
        return {name: value for name, value in weights.items() if not name.startswith(_AUXILIARY[reference])}
    if reference.startswith("torchvision:densenet"):  # layers were numbered as norm.1, and are norm1
        return {_NUMBERED.sub(r"\1", name): value for name, value in weights.items()}
    return weights
