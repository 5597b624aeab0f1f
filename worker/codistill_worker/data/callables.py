"""Data sets that a user's own callable returns as arrays."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch

from codistill.config.data import Data
from codistill.peer.draws import derive
from codistill.peer.errors import PeerError
from codistill.process import plugins
from codistill.process.randomness import seeded
from codistill_worker.data.sources import Arrays
from codistill_worker.errors import ConfigurationError, is_out_of_memory

__all__ = ["from_callable"]

_INTEGERS = frozenset(
    {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64}
)
_WANTED = "(train_images, train_labels, test_images, test_labels)"


def from_callable(data: Data) -> tuple[Arrays, Arrays]:
    """Call the callable that `data.dataset` names, and check its result.

    It is called with the `data` section if it takes an argument. Meanwhile the global generators are seeded from
    `data.split_seed`. It returns (train_images, train_labels, test_images, test_labels), each a tensor or an array. Images
    are uint8 of shape [N, C, H, W] or [N, H, W], square. Labels are integers of shape [N] from 0 to `data.classes`-1.

    Raises:
        LoadError: it cannot be imported.
        ConfigurationError: it takes other arguments, or returns something else.
        PeerError: it raised an error.
    """
    where = f"data.dataset: {data.dataset!r}"
    function = plugins.load(data.dataset, "data.dataset")
    arguments = _arguments(function, data, where)
    with plugins.users_code(where, PeerError, spare=is_out_of_memory), seeded(derive(data.split_seed, "data")):
        returned = function(*arguments)
    # What it returned may be of the user's classes, whose code runs whenever they are looked at.
    with plugins.users_code(
        where, ConfigurationError, spare=lambda error: isinstance(error, PeerError) or is_out_of_memory(error)
    ):
        return _checked(returned, data, where)


def _checked(returned: Any, data: Data, where: str) -> tuple[Arrays, Arrays]:
    arrays = cast("Sequence[Any] | None", returned if isinstance(returned, tuple | list) else None)
    if arrays is None or len(arrays) != 4:
        size = f" of {len(arrays)}" if arrays is not None else ""
        raise ConfigurationError(f"{where} returned {type(returned).__name__}{size}; expected {_WANTED}")
    train_images, train_labels, test_images, test_labels = arrays
    train = _arrays(train_images, train_labels, data, f"{where}: train")
    test = _arrays(test_images, test_labels, data, f"{where}: test")
    if train.shape != test.shape:
        raise ConfigurationError(
            f"{where}: train_images are {_shown(train.shape)} and test_images {_shown(test.shape)}; "
            "expected the same channels, height and width"
        )
    return train, test


def _arguments(function: Callable[..., Any], data: Data, where: str) -> tuple[Data, ...] | tuple[()]:
    try:
        signature = inspect.signature(function)
    except ValueError:  # a built-in that has no signature to read
        return (data,)
    for arguments in ((data,), ()):
        try:
            signature.bind(*arguments)
        except TypeError:
            continue
        return arguments
    raise ConfigurationError(
        f"{where} is called with the `data` settings or with nothing, but its signature is {signature}"
    )


def _arrays(images: Any, labels: Any, data: Data, where: str) -> Arrays:
    pixels, classes = _tensor(images, f"{where}_images"), _tensor(labels, f"{where}_labels")
    if pixels.dtype is not torch.uint8:
        raise ConfigurationError(f"{where}_images are {_dtype(pixels)}; expected uint8, from 0 to 255")
    if pixels.dim() == 3:
        pixels = pixels[:, None]
    if pixels.dim() != 4 or 0 in pixels.shape or pixels.shape[2] != pixels.shape[3]:
        raise ConfigurationError(
            f"{where}_images have shape {list(pixels.shape)}; "
            "expected [N, C, H, W] or [N, H, W] with H = W, none of them 0"
        )
    if classes.dim() != 1 or classes.dtype not in _INTEGERS:
        raise ConfigurationError(
            f"{where}_labels are {_dtype(classes)} of shape {list(classes.shape)}; expected integers of shape [N]"
        )
    if len(pixels) != len(classes):
        raise ConfigurationError(
            f"{where}_images are {len(pixels)} and {where}_labels {len(classes)}; expected as many of each"
        )
    values = classes.numpy()  # PyTorch has no minimum of uint16, uint32 and uint64
    lowest, highest = int(values.min()), int(values.max())
    if lowest < 0 or highest >= data.class_count:
        raise ConfigurationError(
            f"{where}_labels go from {lowest} to {highest}; "
            f"with data.classes: {data.class_count} they must lie in 0..{data.class_count - 1}"
        )
    return Arrays(pixels, classes.to(torch.int64))


def _tensor(value: Any, where: str) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    try:
        array = np.asarray(value, order="C")
        return torch.tensor(
            array.astype(array.dtype.newbyteorder("="), copy=False)
        )  # a copy, as an array may be read-only
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{where} are of type {type(value).__name__} and make no tensor: {error}") from error


def _dtype(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _shown(shape: tuple[int, int, int]) -> str:
    return "×".join(str(size) for size in shape)
