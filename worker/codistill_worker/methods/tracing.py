"""A model's hidden layers as torchvision traces them, by their names.

Names are those of torchvision's feature extraction: of modules, and of single operations in them. A module's output is
that of the last operation in it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from codistill.process.plugins import explain_error
from codistill_worker.errors import ConfigurationError
from codistill_worker.lazy_imports import torchvision

__all__ = ["TracedModel"]

_LISTED = 60


class TracedModel:
    """A model's traced form, which shares its weights. It is not a module, as that would register the weights twice.

    Args:
        model: the model.
        names: the layers to read.

    Attributes:
        module: the traced form.

    Raises:
        ConfigurationError: the model cannot be traced, a layer is not there, or torchvision is not installed.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        modes = _operation_names(model)
        self._names = {name: _find_operation(name, modes) for name in names}
        self._logits = (modes[0][-1], modes[1][-1])
        pairs = dict.fromkeys([*self._names.values(), self._logits])
        self.module: nn.Module = _feature_extraction().create_feature_extractor(
            model,
            train_return_nodes={train: train for train, _ in pairs},
            eval_return_nodes={evaluation: train for train, evaluation in pairs},
            suppress_diff_warning=True,
        )

    def __call__(self, images: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the logits, [B, C], and the layers' outputs by name."""
        outputs = self.module(images)
        return outputs[self._logits[0]], {name: outputs[train] for name, (train, _) in self._names.items()}


def _feature_extraction() -> Any:
    torchvision()
    from torchvision.models import feature_extraction

    return feature_extraction


def _operation_names(model: nn.Module) -> tuple[list[str], list[str]]:
    """Return the names of a model's operations in training and in evaluation; the last gives the logits."""
    extraction = _feature_extraction()
    try:
        modes = extraction.get_graph_node_names(model, suppress_diff_warning=True)
    except (Exception, SystemExit) as error:
        ended = isinstance(error, SystemExit)
        why = explain_error(error) if ended else " ".join(str(error).split()) or type(error).__name__
        raise ConfigurationError(
            f"hidden layers: the model cannot be traced: {why}; choose a model whose forward has no branches on the "
            "values of tensors, or a method that needs logits only"
        ) from error
    return modes[0][1:], modes[1][1:]  # the first is the images


def _find_operation(name: str, modes: tuple[list[str], list[str]]) -> tuple[str, str]:
    """Return the operation that gives a layer's output, in training and in evaluation."""
    found: list[str] = []
    for nodes in modes:
        inside = [node for node in nodes if node == name or node.startswith(f"{name}.")]
        if not inside or inside[-1] == nodes[-1]:
            problem = "gives the logits and is no hidden layer" if inside else "is not there"
            outer = list(dict.fromkeys(".".join(node.split(".")[:2]) for node in nodes[:-1]))
            shown = ", ".join(outer[:_LISTED]) + (f" and {len(outer) - _LISTED} more" if len(outer) > _LISTED else "")
            close = difflib.get_close_matches(name, list(dict.fromkeys(nodes[:-1] + outer)), 3)
            hint = f"did you mean {' or '.join(repr(other) for other in close)}? " if close and not inside else ""
            raise ConfigurationError(
                f"hidden layers: {name!r} {problem}; {hint}The model has: {shown}, and what is in them"
            )
        found.append(inside[-1])
    return found[0], found[1]
