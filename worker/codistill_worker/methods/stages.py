"""Finds the layers that divide a model's depth, by running the model on empty images."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from codistill_worker.errors import ConfigurationError
from codistill_worker.methods.maps import as_map

__all__ = ["evaluating", "last_layer_with_weights", "run_on_empty_images", "stage_layers"]


def stage_layers(model: nn.Module, count: int, *, channels: int, size: int) -> tuple[str, ...]:
    """Return the names of layers that divide a model's depth evenly, 1/3 and 2/3 of the way for two of them.

    Depth is counted in layers with weights, classifier included. Candidates are the steps of the trunk. These are the
    children of the model, of its Sequentials, and of any module with more than half of the depth. Of the steps after the same
    weights, the last that still is a map of more than one pixel is chosen, if there is one.

    Args:
        model: the model.
        count: the number of layers.
        channels: of an image.
        size: height and width of an image.

    Raises:
        ConfigurationError: the trunk has fewer steps.
    """
    passed: dict[int, list[tuple[str, bool]]] = {}
    with _weights_called(model) as called, ExitStack() as hooks:
        for name, module in _trunk(model):

            def passes(module: nn.Module, given: Any, output: Any, name: str = name) -> None:
                del module, given
                if isinstance(output, Tensor) and output.ndim in (2, 3, 4) and output.is_floating_point():
                    passed.setdefault(len(called), []).append((name, as_map(output)[0, 0].numel() > 1))

            hooks.callback(module.register_forward_hook(passes).remove)
        run_on_empty_images(model, channels=channels, size=size)
    depth = len(called)
    depths = sorted(reached for reached in passed if 0 < reached < depth)
    if len(depths) < count:
        raise ConfigurationError(
            f"the model has {len(depths)} hidden layers in its trunk, {count} are needed; name layers inside of them"
        )
    chosen: list[str] = []
    for position in range(1, count + 1):
        goal = depth * position / (count + 1)
        best = min(depths[: len(depths) - (count - position)], key=lambda reached: abs(reached - goal))
        depths = [reached for reached in depths if reached > best]
        maps = [name for name, is_map in passed[best] if is_map]
        chosen.append((maps or [name for name, _ in passed[best]])[-1])
    return tuple(chosen)


def last_layer_with_weights(model: nn.Module, *, channels: int, size: int) -> str:
    """Return the name of the last layer with weights that the model calls.

    Raises:
        ConfigurationError: the model has none.
    """
    with _weights_called(model) as called:
        run_on_empty_images(model, channels=channels, size=size)
    if not called:
        raise ConfigurationError("embedding: the model has no layer with weights; choose another model or method")
    return called[-1]


@contextmanager
def _weights_called(model: nn.Module) -> Generator[list[str]]:
    """Give a list, to which each layer with weights adds its name when it is called."""
    called: list[str] = []
    with ExitStack() as hooks:
        for name, module in model.named_modules():

            def calls(module: nn.Module, given: Any, name: str = name) -> None:
                del module, given
                called.append(name)

            if _has_weights(module):
                hooks.callback(module.register_forward_pre_hook(calls).remove)
        yield called


def _has_weights(module: nn.Module) -> bool:
    """Return whether a module counts for depth: linear and convolutional layers do, normalisation does not."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim > 1


def _trunk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the steps of a model's trunk and their names, inner ones first."""
    half_of_the_depth = sum(map(_has_weights, model.modules())) / 2

    def inside(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            if (
                isinstance(child, nn.Sequential | nn.ModuleList)
                or sum(map(_has_weights, child.modules())) > half_of_the_depth
            ):
                yield from inside(child, f"{prefix}{name}.")
            yield f"{prefix}{name}", child

    yield from inside(model, "")


def run_on_empty_images(model: nn.Module, *, channels: int, size: int) -> tuple[Tensor, Tensor]:
    """Return two empty images on the model's device, and the logits of the model for them."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    images = torch.zeros(2, channels, size, size, device=device)
    with evaluating(model), torch.no_grad():
        return images, model(images)


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Set a model to evaluation, and back to its mode at the end."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
