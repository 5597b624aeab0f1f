"""The data sets known by name: digits, torchvision's, and ImageNet."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import logging
import pickle
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codistill.config.data import Data
from codistill_worker.data import builtin, load
from codistill_worker.data.builtin import _download_lock
from codistill_worker.errors import ConfigurationError
from codistill_worker.lazy_imports import torchvision
from worker.data.support import CPU, TINY, digits, everything


def test_digits_are_split_in_two() -> None:
    data = digits(train_size=300)
    assert (data.classes, data.channels, data.height, data.width) == (10, 1, 8, 8)
    assert (len(data.train), len(data.test), data.held_out) == (300, 1497, None)
    images = everything(data.train)
    assert images.dtype is torch.uint8
    assert images.shape == (300, 1, 8, 8)
    assert images.max() == 255
    assert data.train.labels.dtype is torch.int64
    assert set(data.test.labels.tolist()) == set(range(10))
    whole = torch.cat([everything(data.train), everything(data.test)]).flatten(1)
    from sklearn.datasets import load_digits

    expected = torch.from_numpy(np.rint(load_digits().data * 255 / 16).astype(np.uint8))
    assert sorted(whole.tolist()) == sorted(expected.tolist())


def test_digits_come_without_an_import_of_scikit_learn_and_are_its_own_in_order(tmp_path: Path) -> None:
    code = (
        "import sys; from codistill_worker.data import builtin; from codistill.config.data import Data; builtin.digits(); "
        "print({'sklearn', 'scipy'} & {*sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
    import sklearn

    values, classes = builtin._digits_of(Path(sklearn.__file__).parent)
    asked_values, asked_classes = builtin._digits_of(tmp_path)  # where there is no such file
    assert np.array_equal(values, asked_values)
    assert np.array_equal(classes, asked_classes)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        ConfigurationError, match="'digits' needs scikit-learn, which is not installed; install it with"
    ):
        digits()


def write_mnist(root: Path, kind: str, train: int, test: int) -> torch.Tensor:
    folder = root / kind / "raw"
    folder.mkdir(parents=True)
    pixels = torch.randint(0, 256, (train + test, 28, 28), dtype=torch.uint8)
    for name, images in (("train", pixels[:train]), ("t10k", pixels[train:])):
        labels = bytes(index % 10 for index in range(len(images)))
        (folder / f"{name}-images-idx3-ubyte").write_bytes(
            struct.pack(">4I", 2051, len(images), 28, 28) + images.numpy().tobytes()
        )
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, len(labels)) + labels)
    return pixels


@pytest.mark.parametrize(("dataset", "kind"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_is_read(tmp_path: Path, dataset: str, kind: str) -> None:
    pixels = write_mnist(tmp_path, kind, 20, 10)
    data = load(Data(dataset=dataset, root=str(tmp_path), test_size=10), CPU)
    assert (data.classes, data.channels, data.height, data.width) == (10, 1, 28, 28)
    assert torch.equal(everything(data.train)[:, 0], pixels[:20])
    assert torch.equal(everything(data.test)[:, 0], pixels[20:])
    assert data.train.labels.tolist() == [index % 10 for index in range(20)]


@pytest.mark.parametrize(
    ("dataset", "kind", "key"), [("cifar10", "CIFAR10", "labels"), ("cifar100", "CIFAR100", "fine_labels")]
)
def test_cifar_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str, kind: str, key: str) -> None:
    known = getattr(torchvision().datasets, kind)
    folder = tmp_path / known.base_folder
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 3, 32, 32), dtype=np.uint8)

    def written(name: str, content: dict[str, Any]) -> str:
        raw = pickle.dumps(content)
        (folder / name).write_bytes(raw)
        return hashlib.md5(raw, usedforsecurity=False).hexdigest()

    for attribute, images in (("train_list", pixels[0]), ("test_list", pixels[1])):
        content = {"data": images.reshape(5, -1), key: [0, 1, 2, 3, 4]}
        monkeypatch.setattr(known, attribute, [[attribute, written(attribute, content)]])
    meta = written("meta", {known.meta["key"]: ["a", "b"]})
    monkeypatch.setattr(known, "meta", {"filename": "meta", "key": known.meta["key"], "md5": meta})
    data = load(Data(dataset=dataset, root=str(tmp_path)), CPU)
    assert (data.channels, data.height, data.width) == (3, 32, 32)
    assert np.array_equal(everything(data.train).numpy(), pixels[0])
    assert np.array_equal(everything(data.test).numpy(), pixels[1])
    assert data.test.labels.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "mnist", "fashion_mnist"])
def test_missing_files_say_what_to_set(tmp_path: Path, dataset: str) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"data.root: .*: {dataset} is not there .* set data.download: true .*or data.root"
    ):
        load(Data(dataset=dataset, root=str(tmp_path)), CPU)


def test_a_download_that_fails_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision().datasets.MNIST, "download", fail)
    with pytest.raises(
        ConfigurationError, match=r"data.download: mnist could not be brought to .*: no route to host; bring its"
    ):
        load(Data(dataset="mnist", root=str(tmp_path / "new"), download=True), CPU)


def test_a_download_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torchvision().datasets.MNIST,
        "download",
        lambda _: write_mnist(tmp_path, "MNIST", 10, 10) if not (tmp_path / "MNIST").exists() else None,
    )
    assert len(load(Data(dataset="mnist", root=str(tmp_path), download=True), CPU).train) == 10


def test_workers_that_download_take_turns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inside, entered, waiting = [], threading.Event(), threading.Event()

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "another worker is downloading" in record.getMessage():
                waiting.set()

    def second() -> None:
        assert entered.wait(20)
        with _download_lock(tmp_path):
            inside.append("second")

    logger = logging.getLogger("codistill_worker.data.builtin")
    watch = Watch()
    logger.addHandler(watch)
    thread = threading.Thread(target=second)
    thread.start()
    try:
        with caplog.at_level(logging.INFO), _download_lock(tmp_path):
            entered.set()
            assert waiting.wait(20)
            inside.append("first")
        thread.join(20)
    finally:
        logger.removeHandler(watch)
    assert inside == ["first", "second"]


def test_imagenet_is_two_folders(tmp_path: Path) -> None:
    raw = b"P6 4 4 255\n" + bytes(48)
    for split in ("train", "val"):
        for number in range(1000):
            folder = tmp_path / split / f"n{number:08}"
            folder.mkdir(parents=True)
            (folder / "0.ppm").write_bytes(raw)
    data = load(Data(dataset="imagenet", root=str(tmp_path), image_size=4, memory_limit_gib=TINY), CPU)
    assert (data.classes, len(data.train), len(data.test)) == (1000, 1000, 1000)
    assert data.mean == (0.485, 0.456, 0.406)
    assert data.train.labels.tolist() == list(range(1000))


def test_imagenet_without_files_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="has no folder train; imagenet needs"):
        load(Data(dataset="imagenet", root=str(tmp_path), image_size=4), CPU)
    with pytest.raises(
        ConfigurationError, match=r"data.download: imagenet could not be brought to .*ILSVRC2012_devkit_t12"
    ):
        load(Data(dataset="imagenet", root=str(tmp_path), image_size=4, download=True), CPU)


@pytest.mark.parametrize("error", [OSError(errno.ENOMEM, "Cannot allocate memory"), torch.OutOfMemoryError("CUDA")])
@pytest.mark.parametrize("download", [False, True])
def test_memory_that_is_short_is_no_missing_data_set(error: Exception, download: bool, tmp_path: Path) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        builtin._read(Data(dataset="cifar10", root=str(tmp_path), download=download), fail)
    assert caught.value is error
