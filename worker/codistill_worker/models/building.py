"""From a model's name in an experiment to a model whose output was checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from pydantic import ConfigDict, ValidationError, validate_call
from torch import nn

from codistill.process import plugins
from codistill.process.interrupts import is_interrupt
from codistill.process.randomness import seeded
from codistill_worker.errors import ConfigurationError, is_out_of_memory
from codistill_worker.models.cnn import cnn
from codistill_worker.models.external import (
    check_timm_name,
    from_callable,
    from_timm,
    from_torchvision,
    refuse_pretrained,
    refuse_unknown,
    torchvision_names,
    unknown_model,
)
from codistill_worker.models.mlp import mlp
from codistill_worker.models.resnet import resnet, wide_resnet
from codistill_worker.models.vit import vit

__all__ = ["build", "builtin_names", "check"]

_BUILTIN: Mapping[str, partial[nn.Module]] = {
    "mlp": partial(mlp),
    "cnn": partial(cnn),
    "vit": partial(vit),
    **{f"resnet{depth}": partial(resnet, depth=depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    "wrn": partial(wide_resnet),
    **{
        f"wrn{depth}_{width}": partial(wide_resnet, depth=depth, width=width)
        for depth, width in ((16, 1), (16, 2), (28, 10), (40, 1), (40, 2))
    },
}
_SHAPE = frozenset({"classes", "channels", "size"})


def builtin_names() -> tuple[str, ...]:
    """Return the names of the built-in models."""
    return tuple(_BUILTIN)


def check(reference: str, args: Mapping[str, Any] | None = None) -> None:
    """Check a model's name without building it, and the names of its arguments where they can be known.

    Raises:
        ConfigurationError: there is no such model, its library is not installed, or it does not take an argument.
        LoadError: a user's callable cannot be imported.
    """
    source, _, name = reference.partition(":")
    if reference in _BUILTIN:
        refuse_unknown(args or {}, _arguments(_BUILTIN[reference]))
        return
    if source == "torchvision":
        refuse_pretrained(args or {})
        names = torchvision_names()
        if name not in names:
            raise unknown_model(
                f"torchvision has no classifier {name!r}",
                name,
                names,
                f"Allowed: {plugins.shorten(names)}, as torchvision.models.list_models() lists them",
            )
    elif source == "timm":
        refuse_pretrained(args or {})
        check_timm_name(name)
    elif plugins.is_reference(reference):
        names = plugins.accepted_arguments(plugins.load(reference, "model"))
        if names is not None:
            refuse_unknown(args or {}, sorted(names - _SHAPE))
    else:
        raise unknown_model(
            f"there is no model {reference!r}",
            reference,
            list(_BUILTIN),
            f"Allowed: {', '.join(_BUILTIN)}, torchvision:NAME, timm:NAME, or package.module:callable",
        )


def build(
    reference: str, *, classes: int, channels: int, size: int, args: Mapping[str, Any], seed: int, title: str = ""
) -> nn.Module:
    """Return a participant's model; run it on two empty images to check that it outputs logits.

    Args:
        reference: a built-in name, `torchvision:NAME`, `timm:NAME` or `package.module:callable`.
        classes: logits for each image.
        channels: of an image.
        size: height and width of an image.
        args: the experiment's `model_args`.
        seed: of the initial weights, 63 bits; the global generators stay as they were.
        title: begins an error's text: the field, the model and its participant.

    Returns:
        The model on the CPU, in training mode: [B, channels, size, size] to [B, classes].

    Raises:
        ConfigurationError: there is no such model, it does not take the arguments or the images, or its output has
            another shape. The text begins with the field, or with the model's name.
        LoadError: a user's callable cannot be imported.
        PeerError: a user's callable raised an error.
    """
    check(reference)
    title = title or f"model {reference!r}"
    source, _, name = reference.partition(":")
    shape = {"classes": classes, "channels": channels, "size": size}
    with seeded(seed):
        try:
            if reference in _BUILTIN:
                model = _builtin(_BUILTIN[reference], shape, args)
            elif source == "torchvision":
                model = from_torchvision(name, **shape, args=args)
            elif source == "timm":
                model = from_timm(name, **shape, args=args)
            else:
                model = from_callable(reference, **shape, args=args)
        except ConfigurationError as error:
            raise ConfigurationError(f"{title}: {error}") from error.__cause__
        _check_output(model, reference, title, **shape)
    return model


def _arguments(factory: partial[nn.Module]) -> list[str]:
    """Return the names of the arguments that an experiment may give a built-in model."""
    parameters = inspect.signature(factory.func).parameters
    return [name for name in parameters if name not in _SHAPE and name not in factory.keywords]


def _builtin(factory: partial[nn.Module], shape: Mapping[str, int], args: Mapping[str, Any]) -> nn.Module:
    refuse_unknown(args, _arguments(factory))
    checked: Callable[..., nn.Module] = validate_call(config=ConfigDict(strict=True))(factory.func)
    try:
        return checked(**shape, **factory.keywords, **args)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        raise ConfigurationError(f"model_args.{field}: {args[field]!r} is not allowed: {first['msg']}") from error


def _check_output(model: nn.Module, reference: str, title: str, *, classes: int, channels: int, size: int) -> None:
    images = torch.zeros(2, channels, size, size)
    try:
        with _evaluating(model), torch.no_grad():
            output = model(images)
    except BaseException as error:
        if is_out_of_memory(error) or is_interrupt(error):
            raise
        own = reference not in _BUILTIN and reference.partition(":")[0] not in ("torchvision", "timm")
        why = plugins.explain_error(error) if own else str(error) or type(error).__name__
        raise ConfigurationError(
            f"{title} cannot take images of [2, {channels}, {size}, {size}]: {why}; "
            "choose another model, or other model_args or data.image_size"
        ) from error
    wanted = f"[2, {classes}]"
    if not isinstance(output, torch.Tensor):
        raise ConfigurationError(
            f"{title} gives a {type(output).__name__} for 2 images; expected a tensor {wanted}: "
            "let it return its logits only"
        )
    if tuple(output.shape) != (2, classes):
        raise ConfigurationError(
            f"{title} gives {list(output.shape)} for 2 images; expected {wanted}: one logit for each class of the data"
        )
    if not output.is_floating_point():
        raise ConfigurationError(
            f"{title} gives {output.dtype} for 2 images; expected a floating-point tensor {wanted}"
        )


@contextmanager
def _evaluating(model: nn.Module) -> Generator[None]:
    model.eval()
    try:
        yield
    finally:
        model.train()
