"""Data sets of files: folders of images, streamed or kept, and ImageNet."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from codistill.config.data import Data
from codistill_worker.data import Dataset, load, sources
from codistill_worker.data.dataset import MemorySplit, StreamedSplit
from codistill_worker.data.sources import decode_image
from codistill_worker.errors import ConfigurationError
from worker.data.support import CPU, TINY, everything

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
