"""Folders of images: one folder for each class."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from codistill_worker.errors import ConfigurationError
from worker.data.support import everything, folder, write_folder


def test_folders_are_classes_in_the_order_of_their_names(two_classes: Path) -> None:
    (two_classes / "train" / "cat" / "notes.txt").write_text("not an image")
    (two_classes / "train" / ".hidden").mkdir()
    deeper = two_classes / "train" / "dog" / "more"
    deeper.mkdir()
    Image.fromarray(np.full((6, 6, 3), 9, np.uint8)).save(deeper / "0.PNG")
    data = folder(two_classes)
    assert data.train.labels.tolist() == [0] * 5 + [1] * 8
    assert data.test.labels.tolist() == [0, 0, 1, 1, 1]
    paths = [*(two_classes / "train" / "cat").glob("*.png"), *(two_classes / "train" / "dog").glob("*.png")]
    expected = [np.asarray(Image.open(path)).transpose(2, 0, 1).tolist() for path in sorted(paths)]
    expected.append(np.full((3, 6, 6), 9).tolist())  # dog/more/0.PNG comes after dog/0.png … dog/6.png
    assert everything(data.train).tolist() == expected


def test_val_stands_for_test(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train": {"a": 1, "b": 1}, "val": {"a": 1, "b": 2}})
    assert len(folder(tmp_path).test) == 3


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


def test_a_line_for_each_split_says_what_is_taken_and_what_is_not(
    two_classes: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.heic", "b.HEIC", "notes.txt", ".DS_Store", "README"):
        (two_classes / "train" / "cat" / name).touch()
    with caplog.at_level(logging.INFO):
        folder(two_classes)
    train, test = [record.getMessage() for record in caplog.records]
    assert train == (
        f"data.root: {two_classes}/train: 12 images in 2 classes; left out: 2 ending in .heic (cat/a.heic), "
        "1 ending in .txt (cat/notes.txt), 1 hidden (cat/.DS_Store), 1 without a suffix (cat/README)"
    )
    assert test == f"data.root: {two_classes}/test: 5 images in 2 classes"


@pytest.mark.parametrize("shared", ["split", "class", "image", "image of training", "elsewhere", "nothing"])
def test_test_images_that_are_training_images_are_said(
    shared: str, two_classes: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train, test = two_classes / "train", two_classes / "test"
    if shared == "split":
        shutil.rmtree(test)
        test.symlink_to(train)
    elif shared == "class":
        shutil.rmtree(test / "cat")
        (test / "cat").symlink_to(train / "cat")
    elif shared == "image":
        (test / "cat" / "link.png").symlink_to(train / "cat" / "0.png")
    elif shared == "image of training":
        (train / "cat" / "link.png").symlink_to(test / "cat" / "0.png")
    elif shared == "elsewhere":
        (test / "dog" / "0.png").rename(two_classes / "0.png")
        for split in (train, test):
            (split / "dog" / "link.png").symlink_to(two_classes / "0.png")
    folder(two_classes)
    warnings = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    if shared == "nothing":
        assert not warnings
    else:
        (warning,) = warnings
        assert warning.startswith(f"data.root: {test} holds images that {train} holds too (")


def test_a_class_without_images_is_explained_by_what_is_left_out(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train": {"a": 1, "b": 0}, "test": {"a": 1, "b": 1}})
    (tmp_path / "train" / "b" / "0.heic").touch()
    with pytest.raises(ConfigurationError, match=r"b holds no image; .*; left out: 1 ending in \.heic \(b/0\.heic\)"):
        folder(tmp_path)


def test_a_root_that_cannot_be_read_is_named(two_classes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", denied)
    with pytest.raises(ConfigurationError, match=r"data\.root: .* cannot be read: Permission denied; make it readable"):
        folder(two_classes)


@pytest.mark.parametrize(("field", "split", "count"), [("train_size", "training", 12), ("test_size", "test", 5)])
def test_more_samples_than_there_are_is_an_error(two_classes: Path, field: str, split: str, count: int) -> None:
    assert len(folder(two_classes, **{field: count}).train) == 12
    with pytest.raises(
        ConfigurationError, match=f"data.{field}: 13 is more than the {count} {split} samples of image_folder"
    ):
        folder(two_classes, **{field: 13})
