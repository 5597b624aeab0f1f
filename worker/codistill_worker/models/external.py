"""Models from elsewhere: torchvision's, timm's, and those that a user's callable returns."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from codistill.config.errors import PRETRAINED, PRETRAINED_KEYS
from codistill.peer.errors import PeerError
from codistill.process import plugins
from codistill_worker.errors import ConfigurationError, is_out_of_memory
from codistill_worker.lazy_imports import timm, torchvision
from codistill_worker.models import stems

__all__ = [
    "check_timm_name",
    "from_callable",
    "from_timm",
    "from_torchvision",
    "refuse_pretrained",
    "refuse_unknown",
    "torchvision_names",
    "unknown_model",
]

_PATCHES_ALONG_A_SIDE = 8


def unknown_model(problem: str, name: str, names: list[str], allowed: str) -> ConfigurationError:
    """Return the error for an unknown name, with the closest known ones."""
    close = difflib.get_close_matches(name.lower(), names, 3)
    hint = f"did you mean {' or '.join(repr(known) for known in close)}? " if close else ""
    return ConfigurationError(f"model: {problem}; {hint}{allowed}")


def torchvision_names() -> list[str]:
    """Return the names of torchvision's classification models."""
    module = torchvision()
    return module.models.list_models(module=module.models)


def from_torchvision(name: str, *, classes: int, channels: int, size: int, args: Mapping[str, Any]) -> nn.Module:
    """Return an untrained classifier of torchvision's, fitted to small images by :mod:`.stems`.

    Raises:
        ConfigurationError: an argument is not one of the model's, or has a value that it refuses.
    """
    fixed: dict[str, Any] = {"weights": None, "num_classes": classes}
    if name in ("googlenet", "inception_v3"):  # one output each, and the initialisation that both warn may change
        fixed |= {"aux_logits": False, "init_weights": True}
    patch = None
    if name.startswith("vit_"):
        own = int(name.rsplit("_", 1)[1])
        patch = _vit_patch(size) if size <= stems.SMALL else own
        # The number of positions follows from image and patch; the patch itself is torchvision's to choose, and is
        # changed below.
        fixed["image_size"] = size // patch * own if size <= stems.SMALL else size
    elif name.startswith("maxvit"):
        fixed["input_size"] = (size, size)
    model: Any = _constructed(partial(torchvision().models.get_model, name), fixed, args)
    if patch is not None and model.patch_size != patch:
        convolution = model.conv_proj
        model.conv_proj = nn.Conv2d(3, convolution.out_channels, patch, patch)
        nn.init.trunc_normal_(model.conv_proj.weight, std=(3 * patch**2) ** -0.5)
        model.patch_size, model.image_size = patch, size
    stems.fit(model, name, size)
    stems.set_channels(model, channels)
    return model


def _vit_patch(size: int) -> int:
    """Return the largest patch that divides a small image and leaves at least 8 along a side."""
    largest = max(1, size // _PATCHES_ALONG_A_SIDE)
    return max(side for side in range(1, largest + 1) if size % side == 0)


def check_timm_name(name: str) -> None:
    """Check that timm has a model of this name.

    Raises:
        ConfigurationError: it has none, or is not installed.
    """
    module = timm()
    if not module.is_model(name):
        raise unknown_model(
            f"timm has no model {name!r}",
            name,
            module.list_models(),
            "Allowed: what timm.list_models() lists, without a tag of weights",
        )


def from_timm(name: str, *, classes: int, channels: int, size: int, args: Mapping[str, Any]) -> nn.Module:
    """Return an untrained model of timm's, built for the image's size where it takes one.

    timm's stems stay as they are; the experiment can give a family's argument for small images.

    Raises:
        ConfigurationError: an argument is not one of the model's, or has a value that it refuses.
    """

    def create(**all_args: Any) -> nn.Module:
        try:
            return timm().create_model(name, pretrained=False, img_size=size, **all_args)
        except TypeError as error:  # many take images of any size, and no such argument
            if "img_size" not in str(error):
                raise
            return timm().create_model(name, pretrained=False, **all_args)

    return _constructed(create, {"num_classes": classes, "in_chans": channels}, args)


def from_callable(reference: str, *, classes: int, channels: int, size: int, args: Mapping[str, Any]) -> nn.Module:
    """Return the model that a user's callable builds.

    It is called with the model's arguments, and with those of `classes`, `channels` and `size` that its signature has.

    Raises:
        LoadError: it cannot be imported.
        ConfigurationError: it does not take an argument, or returns no module.
        PeerError: it raised an error.
    """
    function = plugins.load(reference, "model")
    given = {"classes": classes, "channels": channels, "size": size}
    names = plugins.accepted_arguments(function)
    if names is not None:
        refuse_unknown(args, sorted(names - {*given}))
        given = {name: value for name, value in given.items() if name in names}
    with plugins.users_code(f"model: {reference!r}", PeerError, spare=is_out_of_memory):
        model = function(**given | dict(args))
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"returned {type(model).__name__}; expected a torch.nn.Module")
    return model


def refuse_unknown(args: Mapping[str, Any], names: list[str]) -> None:
    """Check that a model takes the arguments of the experiment.

    Raises:
        ConfigurationError: it does not take one; the text lists those that it takes.
    """
    for name in args:
        if name not in names:
            _refuse_pretrained(name)
            close = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ConfigurationError(
                f"model_args.{name}: is not an argument of this model; {hint}Accepted: {', '.join(names) or 'none'}"
            )


def refuse_pretrained(args: Mapping[str, Any]) -> None:
    """Check that a library's model is not asked for weights, which it would download, or unpickle from a file.

    Raises:
        ConfigurationError: it is.
    """
    for name in args:
        _refuse_pretrained(name)


def _refuse_pretrained(name: str) -> None:
    if name in PRETRAINED_KEYS:
        raise ConfigurationError(f"model_args.{name}: {PRETRAINED}")


def _constructed(construct: Callable[..., nn.Module], fixed: Mapping[str, Any], args: Mapping[str, Any]) -> nn.Module:
    """Return a library's model; if the arguments are refused, the error lists those that it takes.

    The libraries hand arguments down through several layers, so only a built model shows which it takes.
    """
    refuse_pretrained(args)
    for name in args:
        if name in fixed:
            raise ConfigurationError(f"model_args.{name}: follows from the data set and may not be given")
    try:
        return construct(**fixed, **args)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = str(error) or type(error).__name__
        if not args:
            raise ConfigurationError(f"cannot be built: {reason}") from error
        try:
            plain = construct(**fixed)
        except (TypeError, ValueError, AssertionError, RuntimeError):
            raise ConfigurationError(f"cannot be built: {reason}") from error
        parameters = inspect.signature(type(plain).__init__).parameters.values()
        names = sorted(
            parameter.name
            for parameter in parameters
            if parameter.default is not parameter.empty and parameter.name not in fixed
        )
        refuse_unknown(args, names)
        given = ", ".join(f"{name}: {value!r}" for name, value in args.items())
        raise ConfigurationError(f"model_args: {given}: {reason}. Accepted: {', '.join(names)}") from error
