"""From the experiment's `data` section to a data set: found, split, measured and placed."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch

from codistill.config.data import Data
from codistill.config.datasets import DATASETS
from codistill.peer.draws import derive, permutation
from codistill.process import plugins
from codistill_worker.data.builtin import TORCHVISION, digits, imagenet, torchvision_set
from codistill_worker.data.callables import from_callable
from codistill_worker.data.dataset import Dataset, Split
from codistill_worker.data.folders import image_folder, splits
from codistill_worker.data.sources import Source
from codistill_worker.errors import ConfigurationError

__all__ = ["check", "image_of", "load"]

_log = logging.getLogger(__name__)

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_MEASURED_IMAGES = 65_536
_MEASURED_VALUES_AT_ONCE = 2**22
_DIGITS_TRAIN_SHARE = 0.75
_GIB = 2**30


def load(data: Data, device: torch.device) -> Dataset:
    """Load a data set.

    Subsets are drawn without regard to class, by permutations that follow from `data.split_seed`. They keep the
    data set's own order. A smaller subset is part of a larger one of the same seed. Held-out samples come out of the
    training samples. Channel statistics are measured on the training samples that remain, on at most 65,536 of them.

    Args:
        data: the experiment's section.
        device: of the batches. All splits are kept there as bytes if together they take at most `data.memory_limit_gib`.
            Otherwise files are decoded as they are needed, and arrays stay in the host's memory; threads read both ahead.

    Raises:
        ConfigurationError: the data set cannot be found or read, or is not as the section says.
        LoadError: a user's callable cannot be imported.
    """
    train, test = _train_and_test(data)
    channels, height, width = train.shape
    if data.image_size not in (None, height):
        raise ConfigurationError(
            f"data.image_size: {data.image_size}, but {data.dataset} has images of {height}×{width}, "
            "which are not resized; leave it out"
        )
    if data.normalize and len(data.normalize.mean) != channels:
        raise ConfigurationError(
            f"data.normalize: {len(data.normalize.mean)} channels, but the images of {data.dataset} have {channels}"
        )
    if data.held_out >= len(train):
        raise ConfigurationError(
            f"data.held_out: {data.held_out} leaves nothing of the {len(train)} training samples; "
            f"lower it to at most {len(train) - 1}"
        )
    held_out_ids = _drawn(data.held_out, len(train), derive(data.split_seed, "held_out"))
    sources = {"train": train, "test": test}
    if data.held_out:
        kept = torch.ones(len(train), dtype=torch.bool)
        kept[held_out_ids] = False
        sources |= {"train": train.select(kept.nonzero()[:, 0]), "held_out": train.select(held_out_ids)}
    needed = sum(source.decoded_bytes for source in sources.values())
    fits = needed <= data.memory_limit_gib * _GIB
    if not fits:
        _log.info(
            "data.memory_limit_gib: %g is less than the %.1f GiB of the decoded images; they stay off the device",
            data.memory_limit_gib,
            needed / _GIB,
        )
    splits = {
        name: source.split(device, on_device=fits, threads=data.loader_workers) for name, source in sources.items()
    }
    mean, std = _statistics(data, splits["train"], train.shape)
    return Dataset(
        image_digests={name: source.digest() for name, source in sources.items()},
        classes=data.class_count,
        train=splits["train"],
        test=splits["test"],
        held_out=splits.get("held_out"),
        held_out_ids=held_out_ids,
        mean=mean,
        std=std,
        channels=channels,
        height=height,
        width=width,
    )


def image_of(data: Data) -> tuple[int, int]:
    """Return channels and size of a data set's images; load the data set if nothing else says.

    Raises:
        ConfigurationError, LoadError: as :func:`load`.
    """
    known = DATASETS.get(data.dataset)
    size = data.image_size or (known.size if known is not None else None)
    if known is not None and known.channels is not None and size is not None:
        return known.channels, size
    loaded = load(data, torch.device("cpu"))
    return loaded.channels, loaded.height


def check(data: Data) -> None:
    """Check that a data set is where the section says, as far as possible without loading it.

    Raises:
        ConfigurationError: it is not there.
        LoadError: a user's callable cannot be imported.
    """
    if data.dataset not in DATASETS:
        plugins.load(data.dataset, "data.dataset")
    elif data.dataset == "image_folder" or (data.dataset == "imagenet" and not data.download):
        splits(data)
    elif data.dataset in TORCHVISION and not data.download and not Path(data.root).is_dir():
        raise ConfigurationError(
            f"data.root: {data.root}: there is no such folder; set data.download: true to download {data.dataset} to it, "
            "or data.root to the folder that has it"
        )


def _train_and_test(data: Data) -> tuple[Source, Source]:
    """Return the training and the test samples, each in the size that the section asks for."""
    if data.dataset == "digits":
        return _digits(data)
    train: Source
    test: Source
    if data.dataset in TORCHVISION:
        train, test = torchvision_set(data)
    elif data.dataset == "imagenet":
        train, test = imagenet(data)
    elif data.dataset in DATASETS:
        train, test = image_folder(data)
    else:
        train, test = from_callable(data)
    return _subset(train, "train_size", data.train_size, data), _subset(test, "test_size", data.test_size, data)


def _digits(data: Data) -> tuple[Source, Source]:
    """Split the digits, which come in one piece; three quarters are trained on if `train_size` does not say."""
    everything = digits()
    total = len(everything)
    train_size = data.train_size if data.train_size is not None else int(total * _DIGITS_TRAIN_SHARE)
    if train_size >= total:
        raise ConfigurationError(
            f"data.train_size: {train_size} leaves nothing of the {total} digits to test on; "
            f"lower it to at most {total - 1}"
        )
    order = permutation(derive(data.split_seed, "train_size"), total)
    rest = order[train_size:]
    test_size = len(rest) if data.test_size is None else data.test_size
    if test_size > len(rest):
        raise ConfigurationError(
            f"data.test_size: {test_size} is more than the {len(rest)} of {total} digits "
            f"that data.train_size: {train_size} leaves"
        )
    return everything.select(order[:train_size].sort().values), everything.select(rest[:test_size].sort().values)


def _subset(source: Source, field: str, wanted: int | None, data: Data) -> Source:
    if wanted is None:
        return source
    if wanted > len(source):
        split = "training" if field == "train_size" else "test"
        raise ConfigurationError(
            f"data.{field}: {wanted} is more than the {len(source)} {split} samples of {data.dataset}; "
            f"lower it to at most {len(source)}, or leave it out to take all"
        )
    return source.select(_drawn(wanted, len(source), derive(data.split_seed, field)))


def _drawn(count: int, size: int, seed: int) -> torch.Tensor:
    """Return `count` of 0..size-1, at most all of them, in ascending order."""
    return permutation(seed, size)[:count].sort().values


def _statistics(data: Data, train: Split, shape: tuple[int, int, int]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if data.normalize:
        return data.normalize.mean, data.normalize.std
    if data.dataset == "imagenet":
        return _IMAGENET
    return _measured(train, shape, derive(data.split_seed, "statistics"))


def _measured(split: Split, shape: tuple[int, int, int], seed: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel, of values scaled to 0..1.

    Pixels are counted by value, so every device and every order gives the same bits. A channel that is constant gets
    the deviation of one step of 255, as nothing can be divided by 0.
    """
    ids = _drawn(_MEASURED_IMAGES, len(split), seed)
    counts = torch.zeros(shape[0], 256, dtype=torch.int64)
    for images in split.stream(ids.split(max(1, _MEASURED_VALUES_AT_ONCE // math.prod(shape)))):
        channels = images.transpose(0, 1).flatten(1)
        counts += torch.stack([torch.bincount(values, minlength=256) for values in channels]).cpu()
    values = torch.arange(256)
    total = len(ids) * shape[1] * shape[2]
    sums: list[int] = (counts * values).sum(1).tolist()
    squares: list[int] = (counts * values**2).sum(1).tolist()
    mean = tuple(value / total / 255 for value in sums)
    # n·Σx² − (Σx)² is exact in Python's integers, where a difference of floats would cancel
    std = tuple(
        max(math.sqrt(total * square - value**2) / total, 1.0) / 255
        for value, square in zip(sums, squares, strict=True)
    )
    return mean, std
