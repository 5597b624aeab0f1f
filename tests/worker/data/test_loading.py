"""Data sets: found, split, measured and streamed."""

from __future__ import annotations

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
from codistill_worker.data import Dataset, builtin, check_batch, load, loading
from codistill_worker.data.builtin import _alone
from codistill_worker.data.dataset import MemorySplit
from codistill_worker.errors import ConfigurationError
from codistill_worker.lazy_imports import torchvision
from worker.data.support import CPU, everything


def digits(**settings: Any) -> Dataset:
    return load(Data(dataset="digits", **settings), CPU)


# --- digits and subsets


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


def test_three_quarters_of_the_digits_are_trained_on_by_default() -> None:
    data = digits()
    assert (len(data.train), len(data.test)) == (1347, 450)


def test_a_smaller_subset_is_part_of_a_larger_one() -> None:
    small, large = digits(train_size=100), digits(train_size=200)
    rows = {bytes(image) for image in everything(large.train).flatten(1).numpy()}
    assert all(bytes(image) in rows for image in everything(small.train).flatten(1).numpy())


def test_subsets_follow_from_the_split_seed() -> None:
    same = digits(train_size=100, held_out=20)
    assert digits(train_size=100, held_out=20).fingerprint() == same.fingerprint()
    assert digits(train_size=100, held_out=20, split_seed=1).fingerprint() != same.fingerprint()


def test_held_out_samples_come_out_of_the_training_samples() -> None:
    whole, data = digits(train_size=100), digits(train_size=100, held_out=30)
    assert data.held_out is not None
    assert (len(data.train), len(data.held_out), len(data.test)) == (70, 30, 1697)
    kept = [index for index in range(100) if index not in set(data.held_out_ids.tolist())]
    assert torch.equal(everything(data.held_out), whole.train.images(data.held_out_ids))
    assert torch.equal(everything(data.train), whole.train.images(torch.tensor(kept)))
    assert torch.equal(data.held_out.labels, whole.train.labels[data.held_out_ids])
    assert torch.equal(data.train.labels, whole.train.labels[kept])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_size": 1797}, "data.train_size: 1797 leaves nothing of the 1797 digits to test on"),
        (
            {"train_size": 1700, "test_size": 98},
            "data.test_size: 98 is more than the 97 of 1797 digits that data.train_size: 1700",
        ),
        (
            {"train_size": 50, "held_out": 50},
            "data.held_out: 50 leaves nothing of the 50 training samples; .* at most 49",
        ),
        ({"image_size": 16}, "data.image_size: 16, but digits has images of 8×8"),
        (
            {"normalize": {"mean": [0, 0, 0], "std": [1, 1, 1]}},
            "data.normalize: 3 channels, but the images of digits have 1",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        digits(**settings)


def test_a_batch_must_fit_the_training_samples() -> None:
    data = digits(train_size=60, held_out=20)
    check_batch(data, 40)
    with pytest.raises(
        ConfigurationError, match=r"batch_size: 41 is larger than the 40 training samples \(another 20 are"
    ):
        check_batch(data, 41)
    with pytest.raises(ConfigurationError, match="batch_size: 61 is larger than the 60 training samples; lower it"):
        check_batch(digits(train_size=60), 61)


def test_the_fingerprint_tells_what_differs() -> None:
    data = digits(train_size=50, test_size=40, held_out=5)
    swapped = data.train.labels.clone()
    swapped[[0, 1]] = torch.tensor([int(swapped[1]) + 1, int(swapped[0]) + 1]) % 10
    train = MemorySplit(everything(data.train), swapped, CPU)
    changes: list[dict[str, Any]] = [
        {"train": train},
        {"test": train},
        {"classes": 11},
        {"channels": 3},
        {"height": 9},
        {"width": 9},
        {"held_out_ids": data.held_out_ids + 1},
        {"held_out": None, "held_out_ids": data.held_out_ids[:0]},
    ]
    prints = {Dataset(**{**vars(data), **change}).fingerprint() for change in changes}
    assert len({data.fingerprint(), *prints}) == len(changes) + 1
    assert len(data.fingerprint()) == 64


# --- statistics


def test_statistics_are_those_of_the_training_samples() -> None:
    data = digits(train_size=300, held_out=50)
    values = everything(data.train).double() / 255
    assert data.mean == pytest.approx((values.mean().item(),), rel=1e-12)
    assert data.std == pytest.approx((values.std(correction=0).item(),), rel=1e-12)


def test_given_statistics_are_taken() -> None:
    data = digits(normalize={"mean": [0.5], "std": [0.25]})
    assert (data.mean, data.std) == ((0.5,), (0.25,))


def test_a_large_set_is_measured_on_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_MEASURED_IMAGES", 100)
    monkeypatch.setattr(loading, "_MEASURED_VALUES_AT_ONCE", 640)  # ten images
    data, other = digits(), digits(split_seed=1)
    assert data.mean == pytest.approx((everything(data.train).double().mean().item() / 255,), rel=0.1)
    assert data.mean != other.mean


# --- torchvision's


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
        with _alone(tmp_path):
            inside.append("second")

    logger = logging.getLogger("codistill_worker.data.builtin")
    watch = Watch()
    logger.addHandler(watch)
    thread = threading.Thread(target=second)
    thread.start()
    try:
        with caplog.at_level(logging.INFO), _alone(tmp_path):
            entered.set()
            assert waiting.wait(20)
            inside.append("first")
        thread.join(20)
    finally:
        logger.removeHandler(watch)
    assert inside == ["first", "second"]
