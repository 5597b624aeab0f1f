"""Data sets that are folders of image files: one folder for each class."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from codistill.config.data import Data
from codistill_worker.data.sources import Files
from codistill_worker.errors import ConfigurationError

__all__ = ["SUFFIXES", "image_folder", "splits"]

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def image_folder(data: Data) -> tuple[Files, Files]:
    """Find the training and the test images below `data.root`.

    Classes are numbered in the order of their folders' names, images in the order of their paths. Both are compared by code
    point, so that every machine counts alike. A class folder may have subfolders.

    Returns:
        `root`/train and `root`/test, or `root`/val where there is no test.

    Raises:
        ConfigurationError: a folder is missing or empty, the splits have different classes, or there are not
            `data.classes` of them.
    """
    train, test = splits(data)
    names, expected = _classes(train), data.class_count
    if (other := _classes(test)) != names:
        unmatched = sorted({*names} ^ {*other})
        listed = ", ".join(unmatched[:5]) + (", …" if len(unmatched) > 5 else "")
        raise ConfigurationError(
            f"data.root: {train} and {test} must hold the same classes; {len(unmatched)} are in one of them only: {listed}"
        )
    if len(names) != expected:
        raise ConfigurationError(
            f"data.classes: {expected}, but {train} holds {len(names)} class folders; make them agree"
        )
    assert data.image_size is not None  # noqa: S101 - the schema asks for it
    return _files(train, names, data.image_size), _files(test, names, data.image_size)


def splits(data: Data) -> tuple[Path, Path]:
    """Return the folders of the training and the test images.

    Raises:
        ConfigurationError: one is not there.
    """
    root = Path(data.root)
    train = root / "train"
    test = next((path for path in (root / "test", root / "val") if path.is_dir()), None)
    if not train.is_dir() or test is None:
        missing = "train" if not train.is_dir() else "test (or val)"
        raise ConfigurationError(
            f"data.root: {data.root}: has no folder {missing}; {data.dataset} needs train/CLASS/* and test/CLASS/* "
            "(or val) there. Set data.root to the folder that holds them"
        )
    return train, test


def _classes(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _files(folder: Path, names: list[str], size: int) -> Files:
    paths: list[str] = []  # text, not Path objects: a large set has over a million
    labels: list[int] = []
    for label, name in enumerate(names):
        in_class = sorted(
            f"{place}/{file}"
            for place, _, files in os.walk(folder / name, followlinks=True)
            for file in files
            if Path(file).suffix.lower() in SUFFIXES
        )
        paths += in_class
        labels += [label] * len(in_class)
        if not in_class:
            raise ConfigurationError(
                f"data.root: {folder / name} holds no image; "
                f"it needs at least one file ending in {', '.join(sorted(SUFFIXES))}"
            )
    return Files(paths, torch.tensor(labels, dtype=torch.int64), size)
