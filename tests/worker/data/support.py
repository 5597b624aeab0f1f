"""Data sets of the tests: digits, and small folders of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from codistill.config.data import Data
from codistill_worker.data import Dataset, load

CPU = torch.device("cpu")
TINY = 1e-9  # a memory limit in GiB that nothing fits


def everything(split: Any) -> torch.Tensor:
    return split.images(torch.arange(len(split)))


def digits(**settings: Any) -> Dataset:
    return load(Data(dataset="digits", **settings), CPU)


def write_folder(
    root: Path, layout: dict[str, dict[str, int]], size: tuple[int, int] = (6, 6), suffix: str = "png"
) -> None:
    """Write `count` images of noise for each split and class."""
    generator = np.random.default_rng(0)
    for split, classes in layout.items():
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.{suffix}")


def folder(root: Path, **settings: Any) -> Dataset:
    return load(Data(dataset="image_folder", root=str(root), **{"classes": 2, "image_size": 6, **settings}), CPU)


@pytest.fixture
def two_classes(tmp_path: Path) -> Path:
    write_folder(tmp_path, {"train": {"cat": 5, "dog": 7}, "test": {"cat": 2, "dog": 3}})
    return tmp_path
