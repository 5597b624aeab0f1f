"""Machines that hold other images are told apart, and reading them costs little."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from codistill.config.data import Data
from codistill_worker.data import Dataset, digests, load
from codistill_worker.data.digests import digest_of_files, digest_of_pixels
from codistill_worker.errors import ConfigurationError
from worker.data.support import CPU, TINY, digits, folder, two_classes

__all__ = ["two_classes"]


def test_one_pixel_of_one_image_in_any_split_is_another_data_set(two_classes: Path) -> None:
    original = folder(two_classes, held_out=3)
    for place in ("train/dog/3.png", "train/cat/0.png", "test/cat/1.png"):
        path = two_classes / place
        before = path.read_bytes()
        with Image.open(path) as image:
            pixels = np.asarray(image).copy()
        pixels[0, 0, 0] ^= 1
        Image.fromarray(pixels).save(path)
        changed = folder(two_classes, held_out=3)
        assert changed.fingerprint() != original.fingerprint()
        assert changed.digests["labels"] == original.digests["labels"]
        path.write_bytes(before)
    assert folder(two_classes, held_out=3).fingerprint() == original.fingerprint()


def test_neither_the_folders_place_nor_the_memory_limit_nor_the_files_times_count(
    two_classes: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "copy"
    original = folder(two_classes).fingerprint()
    for path in two_classes.rglob("*.png"):
        os.utime(path, (1, 1))
    two_classes.rename(elsewhere)
    assert folder(elsewhere).fingerprint() == original
    assert folder(elsewhere, memory_limit_gib=TINY).fingerprint() == original


def called(monkeypatch: pytest.MonkeyPatch, images: np.ndarray | torch.Tensor) -> Dataset:
    module = types.ModuleType("arrays_of_mine")
    labels = np.zeros(len(images), dtype=np.int64)
    module.make = lambda: (images, labels, images, labels)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "arrays_of_mine", module)
    return load(Data(dataset="arrays_of_mine:make", classes=2), CPU)


def test_arrays_of_a_callable_with_other_pixels_are_another_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.arange(5 * 4 * 4, dtype=np.uint8).reshape(5, 4, 4)
    original = called(monkeypatch, images)
    assert called(monkeypatch, torch.from_numpy(images.copy())).fingerprint() == original.fingerprint()
    assert called(monkeypatch, np.asfortranarray(images)).fingerprint() == original.fingerprint()
    changed = images.copy()
    changed[4, 3, 3] ^= 1
    other = called(monkeypatch, changed)
    assert other.fingerprint() != original.fingerprint()
    assert {name for name, digest in other.digests.items() if digest != original.digests[name]} == {
        "train images",
        "test images",
    }


def test_the_parts_of_the_fingerprint_are_named() -> None:
    assert list(digits(held_out=3).digests) == ["labels", "held_out images", "test images", "train images"]


def test_of_many_files_a_sample_is_read_evenly_spaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_MOST_FILES", 4)
    paths = [str(tmp_path / f"{index}") for index in range(10)]
    for path in paths:
        Path(path).write_bytes(b"a")
    original = digest_of_files(paths)
    noticed: list[int] = []
    for index, path in enumerate(paths):
        Path(path).write_bytes(b"b")
        noticed += [index] if digest_of_files(paths) != original else []
        Path(path).write_bytes(b"a")
    assert noticed == [0, 2, 5, 7]


def test_of_a_large_file_its_size_and_its_beginning_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_MOST_BYTES_OF_A_FILE", 4)
    path = tmp_path / "file"
    found: list[str] = []
    for content in (b"abcdef", b"abcdeg", b"abcdefg", b"bbcdef"):
        path.write_bytes(content)
        found.append(digest_of_files([str(path)]))
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_of_large_arrays_a_sample_is_read_evenly_spaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_MOST_BYTES_OF_PIXELS", 16)
    monkeypatch.setattr(digests, "_BYTES_AT_ONCE", 8)
    images = torch.zeros(10, 1, 2, 2, dtype=torch.uint8)
    original = digest_of_pixels(images)
    noticed: list[int] = []
    for index in range(10):
        images[index] = 1
        noticed += [index] if digest_of_pixels(images) != original else []
        images[index] = 0
    assert noticed == [0, 2, 5, 7]


def test_how_the_bytes_are_taken_in_turns_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(0, 256, (7, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = digest_of_pixels(images)
    monkeypatch.setattr(digests, "_BYTES_AT_ONCE", 1)
    assert digest_of_pixels(images) == whole
    assert digest_of_pixels(images.contiguous(memory_format=torch.channels_last)) == whole


def test_a_file_that_went_away_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"data\.root: .*gone\.png cannot be read: No such file or directory"):
        digest_of_files([str(tmp_path / "gone.png")])
