"""The data sets known by name: scikit-learn's digits, and torchvision's."""

from __future__ import annotations

import gzip
import importlib.util
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from codistill.config.data import Data
from codistill.rundir.files import locked
from codistill_worker.data.folders import image_folder
from codistill_worker.data.sources import Arrays, Files
from codistill_worker.errors import ConfigurationError, is_out_of_memory
from codistill_worker.lazy_imports import torchvision

__all__ = ["TORCHVISION", "digits", "imagenet", "torchvision_set"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

TORCHVISION: Mapping[str, str] = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "fashion_mnist": "FashionMNIST",
    "mnist": "MNIST",
}
"""torchvision's class of each data set that it downloads."""


def digits() -> Arrays:
    """Return scikit-learn's 1,797 handwritten digits, 8×8, values 0..16 scaled to 0..255; they have no test split.

    Raises:
        ConfigurationError: scikit-learn is not installed.
    """
    installed = importlib.util.find_spec("sklearn")
    if installed is None or installed.origin is None:
        raise ConfigurationError(
            "data.dataset: 'digits' needs scikit-learn, which is not installed; "
            "install it with: pip install 'codistill[worker]'"
        )
    values, classes = _digits_of(Path(installed.origin).parent)
    pixels = np.rint(values * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    return Arrays(torch.from_numpy(pixels), torch.from_numpy(classes.astype(np.int64)))


def _digits_of(package: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels' values and the classes that a scikit-learn holds.

    Importing scikit-learn and SciPy takes a second, by which a restarted worker would be late. So its file is read where it
    has always been, and scikit-learn is imported only if the file is not there.
    """
    file = package / "datasets" / "data" / "digits.csv.gz"
    if file.exists():
        with gzip.open(file) as lines:
            table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
        return table[:, :-1], table[:, -1]
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    return bunch.data, bunch.target


def torchvision_set(data: Data) -> tuple[Arrays, Arrays]:
    """Return the training and test images of MNIST, Fashion-MNIST, CIFAR-10 or CIFAR-100.

    torchvision checks the files' MD5 sums before it reads them.

    Raises:
        ConfigurationError: the files are not in `data.root`, or cannot be downloaded to it.
    """
    kind = getattr(torchvision().datasets, TORCHVISION[data.dataset])

    def read(*, train: bool) -> Arrays:
        dataset = kind(data.root, train=train, download=data.download)
        pixels = torch.as_tensor(dataset.data)
        pixels = pixels[:, None] if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
        return Arrays(pixels, torch.as_tensor(dataset.targets, dtype=torch.int64))

    return _read(data, lambda: (read(train=True), read(train=False)))


def imagenet(data: Data) -> tuple[Files, Files]:
    """Find ImageNet's 1,000 classes in `data.root`: train/WNID/* and val/WNID/*.

    If there are archives instead of folders and `data.download` is set, torchvision unpacks them. They are
    `ILSVRC2012_img_train.tar`, `ILSVRC2012_img_val.tar` and `ILSVRC2012_devkit_t12.tar.gz`, whose download needs an
    account.

    Raises:
        ConfigurationError: neither folders nor archives can be used.
    """
    root = Path(data.root)
    if data.download and not ((root / "train").is_dir() and (root / "val").is_dir()):
        kind = torchvision().datasets.ImageNet
        _read(data, lambda: [kind(data.root, split=split) for split in ("train", "val")])
    return image_folder(data)


def _read(data: Data, read: Callable[[], _T]) -> _T:
    """Return the result of `read`, with errors that say which setting to change.

    torchvision raises RuntimeError where files are missing or have another checksum, and OSError (URLError is one) where
    they cannot be fetched, read or written.
    """
    try:
        if not data.download:
            return read()
        with _download_lock(Path(data.root)):
            return read()
    except (RuntimeError, OSError) as error:
        if is_out_of_memory(error):
            raise
        text = str(error).strip().split("\n")[0]
        if data.download:
            raise ConfigurationError(
                f"data.download: {data.dataset} could not be brought to data.root: {data.root}: {text}; "
                "bring its files there yourself, or set data.root to a folder that has them"
            ) from error
        raise ConfigurationError(
            f"data.root: {data.root}: {data.dataset} is not there ({text}); set data.download: true to download it, "
            "or data.root to the folder that has it"
        ) from error


def _download_lock(root: Path) -> AbstractContextManager[object]:
    """Lock the folder, as the workers of one machine start together and one of them is to download."""
    root.mkdir(parents=True, exist_ok=True)
    return locked(
        root / ".codistill-download.lock",
        waiting=lambda: _log.info("another worker is downloading to %s; waiting for it", root),
    )
