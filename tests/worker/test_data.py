"""Data sets: found, split, measured and streamed."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import logging
import pickle
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from codistill.data import Data
from codistill_worker.data import Dataset, builtin, check_batch, load, loading, sources
from codistill_worker.data.builtin import _alone
from codistill_worker.data.dataset import MemorySplit, StreamedSplit
from codistill_worker.data.sources import decode_image
from codistill_worker.errors import ConfigurationError, WorkerError
from codistill_worker.vision import torchvision

CPU = torch.device("cpu")
TINY = 1e-9  # a memory limit in GiB that nothing fits


def digits(**settings: Any) -> Dataset:
    return load(Data(dataset="digits", **settings), CPU)


def everything(split: Any) -> torch.Tensor:
    return split.images(torch.arange(len(split)))


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
        "import sys; from codistill_worker.data import builtin; from codistill.data import Data; builtin.digits(); "
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


# --- files


def write_folder(
    root: Path, layout: dict[str, dict[str, int]], size: tuple[int, int] = (6, 6), suffix: str = "png"
) -> None:
    """Writes `count` images of noise for each split and class."""
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
def tiny(tmp_path: Path) -> Path:
    write_folder(tmp_path, {"train": {"cat": 5, "dog": 7}, "test": {"cat": 2, "dog": 3}})
    return tmp_path


def test_folders_are_classes_in_the_order_of_their_names(tiny: Path) -> None:
    (tiny / "train" / "cat" / "notes.txt").write_text("not an image")
    (tiny / "train" / ".hidden").mkdir()
    deeper = tiny / "train" / "dog" / "more"
    deeper.mkdir()
    Image.fromarray(np.full((6, 6, 3), 9, np.uint8)).save(deeper / "0.PNG")
    data = folder(tiny)
    assert data.train.labels.tolist() == [0] * 5 + [1] * 8
    assert data.test.labels.tolist() == [0, 0, 1, 1, 1]
    paths = [*(tiny / "train" / "cat").glob("*.png"), *(tiny / "train" / "dog").glob("*.png")]
    expected = [np.asarray(Image.open(path)).transpose(2, 0, 1).tolist() for path in sorted(paths)]
    expected.append(np.full((3, 6, 6), 9).tolist())  # dog/more/0.PNG comes after dog/0.png … dog/6.png
    assert everything(data.train).tolist() == expected


def test_val_stands_for_test(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train": {"a": 1, "b": 1}, "val": {"a": 1, "b": 2}})
    assert len(folder(tmp_path).test) == 3


@pytest.mark.parametrize("size", [4, 20, 32])
@pytest.mark.parametrize("shape", [(20, 40), (40, 20), (10, 10)])
def test_other_sizes_are_resized_and_cut_to_the_centre(tmp_path: Path, size: int, shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    out = np.empty((3, size, size), np.uint8)
    decode_image(str(path), out)
    height, width = (side * size // min(shape) for side in shape)
    whole = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
    top, left = (height - size) // 2, (width - size) // 2
    expected = whole[top : top + size, left : left + size].transpose(2, 0, 1)
    assert np.abs(out.astype(int) - expected).max() <= 1  # Pillow rounds between its two passes


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "image.tif"
    Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode).save(path)
    out = np.empty((3, 4, 4), np.uint8)
    decode_image(str(path), out)
    assert out.min() == 255


def test_streamed_and_kept_images_are_the_same(tiny: Path) -> None:
    kept = folder(tiny, held_out=3)
    batches = [torch.tensor([3, 1]), torch.tensor([8]), torch.tensor([0, 1, 2, 3]), torch.tensor([5, 5])]
    for workers in (0, 1, 3):
        streamed = folder(tiny, held_out=3, memory_limit_gib=TINY, loader_workers=workers)
        assert isinstance(streamed.train, StreamedSplit)
        assert isinstance(kept.train, MemorySplit)
        assert streamed.fingerprint() == kept.fingerprint()
        assert (streamed.mean, streamed.std) == (kept.mean, kept.std)
        for one, other in (
            (kept.train, streamed.train),
            (kept.test, streamed.test),
            (kept.held_out, streamed.held_out),
        ):
            assert torch.equal(everything(one), everything(other))
        for one, other in zip(kept.train.stream(batches), streamed.train.stream(iter(batches)), strict=True):
            assert torch.equal(one, other)


def counted(decode: Callable[[int, np.ndarray], None], threads: int) -> StreamedSplit:
    return StreamedSplit(decode, (1, 2, 2), torch.zeros(1000, dtype=torch.int64), CPU, threads)


def test_a_stream_reads_two_batches_ahead_and_no_more() -> None:
    asked: list[int] = []

    def batches() -> Iterator[torch.Tensor]:
        for number in itertools.count():
            asked.append(number)
            yield torch.tensor([number, number + 1])

    stream = counted(lambda index, out: out.fill(index), 2).stream(batches())
    for number in range(4):
        assert next(stream)[:, 0, 0, 0].tolist() == [number, number + 1]
        assert len(asked) == number + 3
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]


def test_a_stream_that_is_closed_leaves_no_thread() -> None:
    def decoders() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("decode")]

    stream = counted(lambda index, out: out.fill(index), 3).stream(
        torch.tensor([number]) for number in itertools.count()
    )
    next(stream)
    assert decoders()
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert not decoders()


@pytest.mark.parametrize("threads", [0, 2])
def test_a_file_that_cannot_be_decoded_fails_in_its_turn(threads: int) -> None:
    def decode(index: int, out: np.ndarray) -> None:
        if index == 2:
            raise ConfigurationError("data.root: 2.png cannot be decoded")
        out.fill(index)

    stream = counted(decode, threads).stream(torch.tensor([number]) for number in range(5))
    assert [int(next(stream)[0, 0, 0, 0]) for _ in range(2)] == [0, 1]
    with pytest.raises(ConfigurationError, match=r"2\.png"):
        next(stream)


@pytest.mark.parametrize("settings", [{}, {"memory_limit_gib": TINY}])
@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n cut short"])
def test_a_broken_file_is_named(tiny: Path, content: bytes, settings: dict[str, Any]) -> None:
    (tiny / "train" / "dog" / "3.png").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"data.root: .*dog/3.png cannot be decoded: .*; replace or remove it"):
        folder(tiny, **settings)


def test_a_truncated_file_is_named(tiny: Path) -> None:
    path = tiny / "test" / "cat" / "1.png"
    path.write_bytes(path.read_bytes()[:90])
    with pytest.raises(ConfigurationError, match=r"cat/1\.png cannot be decoded"):
        folder(tiny)


def test_a_long_load_says_how_far_it_is(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sources, "_SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(sources, "_FILES_PER_JOB", 2)
    with caplog.at_level(logging.INFO):
        folder(tiny)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("decoded 2 of 12 images, about ")
    assert not any("12 of 12" in line for line in lines)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"test": {"a": 1, "b": 1}}, "has no folder train; image_folder needs train/CLASS"),
        ({"train": {"a": 1, "b": 1}}, r"has no folder test \(or val\); image_folder needs"),
        (
            {"train": {"a": 1, "b": 1}, "test": {"a": 1, "c": 1}},
            "must hold the same classes; 2 are in one of them only: b, c",
        ),
        (
            {"train": {"a": 1, "b": 1, "c": 1}, "test": {"a": 1, "b": 1, "c": 1}},
            "data.classes: 2, but .*train holds 3 class folders",
        ),
        (
            {"train": {"a": 1, "b": 0}, "test": {"a": 1, "b": 1}},
            "train/b holds no image; it needs at least one file ending in",
        ),
    ],
)
def test_folders_that_do_not_fit_are_explained(tmp_path: Path, layout: dict[str, dict[str, int]], message: str) -> None:
    write_folder(tmp_path, layout)
    with pytest.raises(ConfigurationError, match=message):
        folder(tmp_path)


@pytest.mark.parametrize(("field", "split", "count"), [("train_size", "training", 12), ("test_size", "test", 5)])
def test_more_samples_than_there_are_is_an_error(tiny: Path, field: str, split: str, count: int) -> None:
    assert len(folder(tiny, **{field: count}).train) == 12
    with pytest.raises(
        ConfigurationError, match=f"data.{field}: 13 is more than the {count} {split} samples of image_folder"
    ):
        folder(tiny, **{field: 13})


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


# --- ImageNet


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


# --- a user's own


def own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str) -> None:
    (tmp_path / "own_data.py").write_text("import numpy as np, torch\n" + source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "own_data", raising=False)


def load_own(**settings: Any) -> Dataset:
    return load(Data(dataset="own_data:make", **{"classes": 3, **settings}), CPU)


@pytest.mark.parametrize(
    "source",
    [
        """
def make():
    test = torch.full((3, 4, 4), 9, dtype=torch.uint8)
    return np.full((6, 4, 4), 7, np.uint8), [0, 1, 2] * 2, test, np.arange(3)
""",
        """
def make(data):
    train = torch.full((6, 1, 4, 4), data.classes + 4, dtype=torch.uint8)
    return [train, torch.arange(6) % 3, np.full((3, 1, 4, 4), 9, np.uint8), np.arange(3, dtype=np.int32)]
""",
        """
class make:
    def __new__(cls, *, size=4):
        train = np.broadcast_to(np.uint8(7), (6, 1, size, size))
        return train, (0, 1, 2, 0, 1, 2), np.full((3, 1, size, size), 9, np.uint8), [0, 1, 2]
""",
    ],
)
def test_a_callable_gives_arrays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str) -> None:
    own(monkeypatch, tmp_path, source)
    data = load_own()
    assert everything(data.train).tolist() == torch.full((6, 1, 4, 4), 7).tolist()
    assert everything(data.test).tolist() == torch.full((3, 1, 4, 4), 9).tolist()
    assert data.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.std == (1 / 255,)  # constant images, and nothing is divided by 0


def test_arrays_beyond_the_limit_stay_in_the_hosts_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own(monkeypatch, tmp_path, "def make(): return (np.zeros((4, 4, 4), np.uint8), [0] * 4) * 2")
    meta = torch.device("meta")  # a device that nothing can be read back from shows where images are
    own_data = Data(dataset="own_data:make", classes=3, normalize={"mean": [0], "std": [1]}, memory_limit_gib=TINY)  # pyright: ignore[reportArgumentType]
    train = load(own_data, meta).train
    assert isinstance(train, MemorySplit)
    assert train._images.device == CPU
    assert train.images(torch.tensor([1])).device == meta


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def make(a, b): pass", r"called with the `data` settings or with nothing, but its signature is \(a, b\)"),
        ("def make(): return 5", "returned int; expected"),
        ("def make(): return 1, 2, 3", r"returned tuple of 3; expected \(train_images, train_labels, test_images"),
        (
            "def make(): return (np.zeros((4, 4, 4)), [0] * 4) * 2",
            "train_images are float64; expected uint8, from 0 to 255",
        ),
        (
            "def make(): return (np.zeros((4, 4), np.uint8), [0] * 4) * 2",
            r"train_images have shape \[4, 4\]; expected \[N, C, H, W\]",
        ),
        (
            "def make(): return (np.zeros((4, 1, 4, 5), np.uint8), [0] * 4) * 2",
            r"shape \[4, 1, 4, 5\]; expected .* with H = W",
        ),
        ("def make(): return (np.zeros((0, 4, 4), np.uint8), []) * 2", r"shape \[0, 1, 4, 4\]; expected"),
        (
            "def make(): return (np.zeros((4, 4, 4), np.uint8), [.5] * 4) * 2",
            r"train_labels are float64 of shape \[4\]; expected integers",
        ),
        (
            "def make(): return (np.zeros((4, 4, 4), np.uint8), [[0]] * 4) * 2",
            r"train_labels are int64 of shape \[4, 1\]",
        ),
        ("def make(): return (np.zeros((4, 4, 4), np.uint8), [0] * 3) * 2", "train_images are 4 and .*train_labels 3"),
        (
            "def make(): return (np.zeros((4, 4, 4), np.uint8), [0, 1, 2, 3]) * 2",
            r"from 0 to 3; with data.classes: 3 they must lie in 0..2",
        ),
        ("def make(): return (np.zeros((4, 4, 4), np.uint8), [-1, 1, 2, 2]) * 2", "go from -1 to 2"),
        (
            "def make(): return (np.zeros((4, 4, 4), np.uint8), ['a'] * 4) * 2",
            "train_labels are of type list and make no tensor",
        ),
        (
            "def make(): return np.zeros((4, 4, 4), np.uint8), [0] * 4, np.zeros((4, 5, 5), np.uint8), [0] * 4",
            "train_images are 1×4×4 and test_images 1×5×5",
        ),
    ],
)
def test_what_a_callable_returns_is_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, message: str
) -> None:
    own(monkeypatch, tmp_path, source)
    with pytest.raises(ConfigurationError, match=message):
        load_own()


def test_a_callables_own_error_says_where_it_was_raised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own(monkeypatch, tmp_path, "def make(): raise KeyError('disk')")
    with pytest.raises(WorkerError, match=r"data\.dataset: 'own_data:make': KeyError at .*own_data\.py:2: 'disk'$"):
        load_own()
