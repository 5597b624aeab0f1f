"""What a model computes on its way to the logits: hidden layers, embeddings, and classifiers on them.

:class:`FeatureExtractor` wraps a student without changing it: its weights, their names and its own forward pass stay those of
the plain model, which is what is evaluated and exported. Hidden layers are read by torchvision's feature extraction,
which traces the model, so they have the names of modules and of operations in them. What the wrapper adds, auxiliary
classifiers, has a part of the weights of its own.

Layers answer in as many shapes as there are models. Here all are maps, [B, channels, height, width]: see
:func:`as_map`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from codistill_worker.errors import ConfigurationError
from codistill_worker.lazy_imports import torchvision

__all__ = ["FeatureExtractor", "as_map", "layer_names", "pooled", "stage_layers"]

_LARGEST = 8
_LISTED = 60


def as_map(output: Tensor) -> Tensor:
    """Returns a layer's output as [B, channels, height, width].

    Tokens are laid out as the square that they were cut from, without a class token before them; where their number
    has no root they are a map of N×1. A vector is a map of 1×1. Images are square and so are maps of them, which tells
    where the channels are.

    Args:
        output: [B, D], [B, N, D], [B, channels, height, width] or [B, height, width, channels].
    """
    if output.ndim == 2:
        return output[:, :, None, None]
    if output.ndim == 4:
        _, first, second, third = output.shape
        return output.permute(0, 3, 1, 2) if first == second != third else output
    tokens = output.shape[1]
    side = math.isqrt(tokens)
    if side and side**2 in (tokens, tokens - 1):
        return output[:, tokens - side**2 :].transpose(1, 2).unflatten(2, (side, side))
    return output.transpose(1, 2)[..., None]


def pooled(output: Tensor) -> Tensor:
    """Returns a layer's output as a map of at most 8×8, larger ones as averages over patches.

    Args:
        output: as :func:`as_map` takes it.
    """
    maps = as_map(output)
    height, width = maps.shape[2:]
    return functional.adaptive_avg_pool2d(maps, (min(height, _LARGEST), min(width, _LARGEST)))


def layer_names(model: nn.Module) -> list[str]:
    """Returns the names of the layers that can be read, in the order of their first operation.

    They are those of modules, outer and inner ones, and of single operations. A module's output is that of the last
    operation in it.

    Raises:
        ConfigurationError: the model cannot be traced, or torchvision is not installed.
    """
    names: dict[str, None] = {}
    for node in _nodes(model)[0][:-1]:
        parts = node.split(".")
        names |= dict.fromkeys(".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return list(names)


def stage_layers(model: nn.Module, count: int, *, channels: int, size: int) -> tuple[str, ...]:
    """Returns the names of layers that divide a model's depth evenly, 1/3 and 2/3 of the way for two of them.

    Depth is counted in layers with weights, classifier included. Looked at are the steps of the trunk: the children of
    the model, of its Sequentials, and of any module that holds more than half of the depth. Of the steps after the
    same weights the last one is taken that still is a map of more than one pixel, if there is any.

    Args:
        model: the model.
        count: how many.
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
        _tried(model, channels, size)
    depth = len(called)
    depths = sorted(each for each in passed if 0 < each < depth)
    if len(depths) < count:
        raise ConfigurationError(
            f"the model has {len(depths)} hidden layers in its trunk, {count} are needed; name layers inside of them"
        )
    chosen: list[str] = []
    for position in range(1, count + 1):
        goal = depth * position / (count + 1)
        best = min(depths[: len(depths) - (count - position)], key=lambda each: abs(each - goal))
        depths = [each for each in depths if each > best]
        maps = [name for name, is_map in passed[best] if is_map]
        chosen.append((maps or [name for name, _ in passed[best]])[-1])
    return tuple(chosen)


class FeatureExtractor(nn.Module):
    """A student that answers with more than its logits.

    Calling it gives, by name: `logits` [B, C]; `features/1`, `features/2`, … the chosen layers' maps, as
    :func:`pooled`; `logits/stage1`, … the auxiliary classifiers' logits [B, C]; `embedding` [B, D], what goes into the
    student's last layer with weights, averaged over a map's pixels. The logits are those of the plain model to the bit.

    An auxiliary classifier is a convolution with as many channels as its map, 3×3 on maps and 1×1 else, a group
    normalisation, a rectifier, the mean of the map and a linear layer. It has no buffers.

    Wrap the student where it is to stay: moving it to another device or dtype later moves a layer's buffers from under
    the traced graph. An in-place operation that follows a layer changes what is read of it.

    Args:
        student: the plain model, on its device.
        channels: of an image.
        size: height and width of an image.
        classes: of the auxiliary classifiers.
        features: names of layers to give as `features/…`.
        heads: names of layers with an auxiliary classifier, as `logits/stage…`.
        embedding: whether to give `embedding`.
        seed: of the classifiers' initial weights, 63 bits; torch's global generator is left as it was.

    Attributes:
        student: the plain model, which shares every weight and buffer with what is called here.
        heads: the auxiliary classifiers.
        shapes: the shape of each output, without the samples.

    Raises:
        ConfigurationError: a layer is not there or is none that can be read, or the model cannot be traced.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        channels: int,
        size: int,
        classes: int,
        features: Sequence[str] = (),
        heads: Sequence[str] = (),
        embedding: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.student = student
        self._features = tuple(features)
        self._stages = tuple(heads)
        self._embedded = _last_with_weights(student, channels, size) if embedding else None
        self._traced = _Traced(student, [*features, *heads]) if features or heads else None
        images, plain = _tried(student, channels, size)
        with _evaluating(student), torch.no_grad():
            logits, layers = self._layers(images)
        if not torch.allclose(logits, plain, equal_nan=True):
            raise ConfigurationError(
                "hidden layers: the traced model gives other logits than the model; choose another"
            )
        for name, output in layers.items():
            _check(name, output)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.heads = nn.ModuleList(_classifier(as_map(layers[name]), classes) for name in heads)
        self.heads.to(images.device)
        self.train(student.training)
        with _evaluating(self), torch.no_grad():
            outputs = self(images)
        self.shapes: Mapping[str, tuple[int, ...]] = {name: tuple(each.shape[1:]) for name, each in outputs.items()}

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Sets the mode of the student, of its traced form and of the classifiers."""
        super().train(mode)
        if self._traced is not None:
            self._traced.module.train(mode)
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Returns all outputs, by name."""
        inputs: list[Tensor] = []
        handle = None
        if self._embedded is not None:
            last = self.student.get_submodule(self._embedded)
            handle = last.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        try:
            logits, layers = self._layers(images)
        finally:
            if handle is not None:
                handle.remove()
        outputs = {"logits": logits}
        for number, name in enumerate(self._features, 1):
            outputs[f"features/{number}"] = pooled(layers[name])
        for number, (name, head) in enumerate(zip(self._stages, self.heads, strict=True), 1):
            outputs[f"logits/stage{number}"] = head(as_map(layers[name]))
        if inputs:
            outputs["embedding"] = as_map(inputs[-1]).mean((2, 3))
        return outputs

    def _layers(self, images: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        return (self.student(images), {}) if self._traced is None else self._traced(images)


class _Traced:
    """A model's traced form, which shares its weights. No module, so that it adds no second names to them."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        modes = _nodes(model)
        self._names = {name: _node(name, modes) for name in names}
        self._logits = (modes[0][-1], modes[1][-1])
        pairs = dict.fromkeys([*self._names.values(), self._logits])
        self.module: nn.Module = _extraction().create_feature_extractor(
            model,
            train_return_nodes={train: train for train, _ in pairs},
            eval_return_nodes={evaluation: train for train, evaluation in pairs},
            suppress_diff_warning=True,
        )

    def __call__(self, images: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        found = self.module(images)
        return found[self._logits[0]], {name: found[train] for name, (train, _) in self._names.items()}


def _extraction() -> Any:
    torchvision()
    from torchvision.models import feature_extraction

    return feature_extraction


def _nodes(model: nn.Module) -> tuple[list[str], list[str]]:
    """Returns the names of a model's operations in training and in evaluation; the last gives the logits."""
    extraction = _extraction()
    try:
        modes = extraction.get_graph_node_names(model, suppress_diff_warning=True)
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise ConfigurationError(
            f"hidden layers: the model cannot be traced: {why}; choose a model whose forward has no branches on the "
            "values of tensors, or a method that needs logits only"
        ) from error
    return modes[0][1:], modes[1][1:]  # the first is the images


def _node(name: str, modes: tuple[list[str], list[str]]) -> tuple[str, str]:
    """Returns the operation whose output a layer's is, in training and in evaluation."""
    found: list[str] = []
    for nodes in modes:
        inside = [node for node in nodes if node == name or node.startswith(f"{name}.")]
        if not inside or inside[-1] == nodes[-1]:
            what = "gives the logits and is no hidden layer" if inside else "is not there"
            outer = list(dict.fromkeys(".".join(node.split(".")[:2]) for node in nodes[:-1]))
            shown = ", ".join(outer[:_LISTED]) + (f" and {len(outer) - _LISTED} more" if len(outer) > _LISTED else "")
            close = difflib.get_close_matches(name, list(dict.fromkeys(nodes[:-1] + outer)), 3)
            hint = f"did you mean {' or '.join(repr(each) for each in close)}? " if close and not inside else ""
            raise ConfigurationError(
                f"hidden layers: {name!r} {what}; {hint}The model has: {shown}, and what is in them"
            )
        found.append(inside[-1])
    return found[0], found[1]


def _check(name: str, output: Any) -> None:
    if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4) or not output.is_floating_point():
        what = f"{output.dtype} {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ConfigurationError(
            f"hidden layers: {name!r} gives {what} for 2 images; allowed are floating-point [2, D], [2, N, D] and "
            "[2, channels, height, width]; name another layer"
        )


def _classifier(maps: Tensor, classes: int) -> nn.Module:
    channels = maps.shape[1]
    kernel = 3 if min(maps.shape[2:]) > 1 else 1
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False),
        nn.GroupNorm(1, channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, classes),
    )


def _last_with_weights(model: nn.Module, channels: int, size: int) -> str:
    with _weights_called(model) as called:
        _tried(model, channels, size)
    if not called:
        raise ConfigurationError("embedding: the model has no layer with weights; choose another model or method")
    return called[-1]


@contextmanager
def _weights_called(model: nn.Module) -> Generator[list[str]]:
    """Gives a list that each layer with weights adds its name to when it is called."""
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
    """Whether a module is a layer that counts for depth: linear or convolutional, and no normalisation."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim > 1


def _trunk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the steps of a model's trunk and their names, outer ones after what is in them."""
    half = sum(map(_has_weights, model.modules())) / 2

    def inside(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            if isinstance(child, nn.Sequential | nn.ModuleList) or sum(map(_has_weights, child.modules())) > half:
                yield from inside(child, f"{prefix}{name}.")
            yield f"{prefix}{name}", child

    yield from inside(model, "")


def _tried(model: nn.Module, channels: int, size: int) -> tuple[Tensor, Tensor]:
    """Returns two empty images on the model's device, and the logits of the model for them."""
    device = next((each.device for each in model.parameters()), torch.device("cpu"))
    images = torch.zeros(2, channels, size, size, device=device)
    with _evaluating(model), torch.no_grad():
        return images, model(images)


@contextmanager
def _evaluating(model: nn.Module) -> Generator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
