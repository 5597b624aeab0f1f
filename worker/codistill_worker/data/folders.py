"""Data sets that are folders of image files: one folder for each class."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from codistill.config.data import Data
from codistill_worker.data.listing import SUFFIXES, Listing
from codistill_worker.data.sources import Files
from codistill_worker.errors import ConfigurationError

__all__ = ["image_folder", "splits"]

_log = logging.getLogger(__name__)


def image_folder(data: Data) -> tuple[Files, Files]:
    """Find the training and the test images below `data.root`.

    Classes are numbered in the order of their folders' names, images in the order of their paths. Both are compared by code
    point, so that every machine counts alike. A class folder may have subfolders and links. One line for each split is
    logged: how many images were taken, and what was left out.

    Returns:
        `root`/train and `root`/test, or `root`/val where there is no test.

    Raises:
        ConfigurationError: a folder is missing, empty or cannot be read, the splits have different classes, or there
            are not `data.classes` of them. A link leads nowhere, or to another class.
    """
    train, test = splits(data)
    train_listing, test_listing = Listing(train), Listing(test)
    names, expected = list(train_listing.files), data.class_count
    if (other := list(test_listing.files)) != names:
        unmatched = sorted({*names} ^ {*other})
        listed = ", ".join(unmatched[:5]) + (", …" if len(unmatched) > 5 else "")
        raise ConfigurationError(
            f"data.root: {train} and {test} must hold the same classes; {len(unmatched)} are in one of them only: {listed}"
        )
    if len(names) != expected:
        raise ConfigurationError(
            f"data.classes: {expected}, but {train} holds {len(names)} class folders; make them agree"
        )
    if shared := train_listing.shared_with(test_listing):
        _log.warning(
            "data.root: %s holds images that %s holds too (%s): its test accuracy is that of images trained on; put other "
            "images there",
            test,
            train,
            shared,
        )
    assert data.image_size is not None  # noqa: S101 - the schema asks for it
    return _files(train, train_listing, data.image_size), _files(test, test_listing, data.image_size)


def splits(data: Data) -> tuple[Path, Path]:
    """Return the folders of the training and the test images.

    Raises:
        ConfigurationError: one is not there.
    """
    root = Path(data.root)
    train = root / "train"
    try:
        has_train = train.is_dir()
        test = next((path for path in (root / "test", root / "val") if path.is_dir()), None)
    except OSError as error:
        raise ConfigurationError(
            f"data.root: {data.root} cannot be read: {error.strerror}; make it readable, or set data.root to another folder"
        ) from error
    if not has_train or test is None:
        missing = "train" if not has_train else "test (or val)"
        raise ConfigurationError(
            f"data.root: {data.root}: has no folder {missing}; {data.dataset} needs train/CLASS/* and test/CLASS/* "
            "(or val) there. Set data.root to the folder that holds them"
        )
    return train, test


def _files(folder: Path, listing: Listing, size: int) -> Files:
    paths: list[str] = []  # text, not Path objects: a large set has over a million
    labels: list[int] = []
    left_out = f"; left out: {listing.left_out}" if str(listing.left_out) else ""
    for label, (name, in_class) in enumerate(listing.files.items()):
        paths += in_class
        labels += [label] * len(in_class)
        if not in_class:
            raise ConfigurationError(
                f"data.root: {folder / name} holds no image; "
                f"it needs at least one file ending in {', '.join(sorted(SUFFIXES))}{left_out}"
            )
    _log.info("data.root: %s: %s images in %d classes%s", folder, f"{len(paths):,}", len(listing.files), left_out)
    return Files(paths, torch.tensor(labels, dtype=torch.int64), size)
