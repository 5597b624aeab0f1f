"""A student's network with more outputs than its logits: hidden layers, embeddings, and classifiers on them.

:class:`FeatureExtractor` wraps a student without changing it. Its weights, their names and its own forward pass stay those
of the plain model, which is evaluated and exported. torchvision's feature extraction traces the model to read hidden
layers. Auxiliary classifiers, which the wrapper adds, have weights of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from codistill.methods import Arrays, StudentContext
from codistill.process.randomness import seeded
from codistill_worker.errors import ConfigurationError
from codistill_worker.methods.maps import as_map, pooled
from codistill_worker.methods.stages import evaluating, last_layer_with_weights, run_on_empty_images, stage_layers
from codistill_worker.methods.tracing import TracedModel

__all__ = ["FeatureExtractor", "SelectedOutputs", "chosen_layers"]


class FeatureExtractor(nn.Module):
    """A student's network with more outputs than its logits.

    The outputs are, by name:

    * `logits` [B, C], those of the plain model to the bit.
    * `features/1`, `features/2`, … the maps of the chosen layers, as :func:`pooled` returns them.
    * `logits/stage1`, … the logits of the auxiliary classifiers, [B, C].
    * `embedding` [B, D], the input of the student's last layer with weights, averaged over a map's pixels.

    An auxiliary classifier begins with a convolution that keeps the number of channels. It is 3×3, or 1×1 where the map
    is one pixel high or wide. Then come a group normalisation, a rectifier, the mean of the map and a linear layer. It has no
    buffers.

    Move the student to its device and dtype before wrapping it: the traced graph keeps the buffers that it was made with.
    An in-place operation after a layer changes the layer's output here too.

    Args:
        student: the plain model, on its device.
        channels: of an image.
        size: height and width of an image.
        classes: of the auxiliary classifiers.
        features: names of the layers behind `features/…`.
        heads: names of the layers with an auxiliary classifier, behind `logits/stage…`.
        embedding: whether to output `embedding`.
        seed: of the classifiers' initial weights, 63 bits; the global generators stay as they were.

    Attributes:
        student: the plain model, which shares its weights and buffers with the wrapper.
        heads: the auxiliary classifiers.
        shapes: the shape of each output, without the samples.

    Raises:
        ConfigurationError: a layer is not there or cannot be read, or the model cannot be traced.
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
        self._heads = tuple(heads)
        self._embedding_layer = last_layer_with_weights(student, channels=channels, size=size) if embedding else None
        self._traced = TracedModel(student, [*features, *heads]) if features or heads else None
        images, plain = run_on_empty_images(student, channels=channels, size=size)
        with evaluating(student), torch.no_grad():
            logits, layers = self._layers(images)
        if not torch.allclose(logits, plain, equal_nan=True):
            raise ConfigurationError(
                "hidden layers: the traced model gives other logits than the model; choose another"
            )
        for name, output in layers.items():
            _check_layer(name, output)
        with seeded(seed):
            self.heads = nn.ModuleList(_classifier(as_map(layers[name]), classes) for name in heads)
        self.heads.to(images.device)
        self.train(student.training)
        with evaluating(self), torch.no_grad():
            outputs = self(images)
        self.shapes: Mapping[str, tuple[int, ...]] = {name: tuple(value.shape[1:]) for name, value in outputs.items()}

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Set the mode of the student, of its traced form and of the classifiers."""
        super().train(mode)
        if self._traced is not None:
            self._traced.module.train(mode)
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return all outputs, by name."""
        embeddings: list[Tensor] = []
        handle = None
        if self._embedding_layer is not None:
            last = self.student.get_submodule(self._embedding_layer)
            handle = last.register_forward_pre_hook(lambda _, given: embeddings.append(given[0]))
        try:
            logits, layers = self._layers(images)
        finally:
            if handle is not None:
                handle.remove()
        outputs = {"logits": logits}
        for stage, name in enumerate(self._features, 1):
            outputs[f"features/{stage}"] = pooled(layers[name])
        for stage, (name, head) in enumerate(zip(self._heads, self.heads, strict=True), 1):
            outputs[f"logits/stage{stage}"] = head(as_map(layers[name]))
        if embeddings:
            outputs["embedding"] = as_map(embeddings[-1]).mean((2, 3))
        return outputs

    def _layers(self, images: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        return (self.student(images), {}) if self._traced is None else self._traced(images)


class SelectedOutputs(nn.Module):
    """The outputs of a network whose names begin with a prefix."""

    def __init__(self, network: nn.Module, prefix: str) -> None:
        super().__init__()
        self.network = network
        self._prefix = prefix

    def forward(self, images: Tensor) -> Arrays:
        """Return the selected outputs, by name."""
        return {name: value for name, value in self.network(images).items() if name.startswith(self._prefix)}


def chosen_layers(context: StudentContext, named: Mapping[str, Sequence[str]], count: int) -> Sequence[str]:
    """Return the hidden layers that a method reads of one student or teacher.

    Args:
        context: the student or teacher.
        named: the layers that the experiment names, by participant; others get layers that divide their depth evenly.
        count: how many layers to find.

    Raises:
        ConfigurationError: a layer is not there, or the model has too few.
    """
    layers = named.get(context.name)
    try:
        if layers is None:
            shape = context.shape
            return stage_layers(context.model, count, channels=shape["channels"], size=shape["size"])
        FeatureExtractor(context.model, **context.shape, features=layers)
    except ConfigurationError as error:
        raise ConfigurationError(f"distillation.layers.{context.name}: {error}") from error
    return layers


def _check_layer(name: str, output: Any) -> None:
    if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4) or not output.is_floating_point():
        kind = f"{output.dtype} {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ConfigurationError(
            f"hidden layers: {name!r} gives {kind} for 2 images; allowed are floating-point [2, D], [2, N, D] and "
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
