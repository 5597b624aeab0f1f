"""The walk over class folders: it ends, takes each image once, and counts what it leaves out."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import pytest

from codistill_worker.data.decoding import _MOST_PIXELS
from codistill_worker.data.listing import _HIDDEN, SUFFIXES, LeftOut, Listing
from codistill_worker.errors import ConfigurationError


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """Two classes, cat and dog, of three images each; nothing in a listing is decoded."""
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for index in range(3):
            (tmp_path / "train" / name / f"{index}.png").touch()
    return tmp_path / "train"


def listed(split: Path) -> dict[str, list[str]]:
    """The images of each class, relative to its folder."""
    files = Listing(split).files
    return {name: [os.path.relpath(path, split / name) for path in paths] for name, paths in files.items()}


THREE = ["0.png", "1.png", "2.png"]
BOTH = {"cat": THREE, "dog": THREE}


def link(path: Path, target: str | Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize(
    "links",
    [
        {"cat/self": "."},
        {f"cat/l{index}": "." for index in range(5)},
        {"cat/up": ".."},
        {"cat/up": "../.."},
        {"cat/root": "/"},
        {"cat/deep/er/up": "../../.."},
        {"cat/deep/er/up": "../.."},
        {"cat/a/to_b": "../b", "cat/b/to_a": "../a"},
        {"cat/a/l": ".", "cat/again": "a"},
        {"cat/l": "l"},
        {"cat/a": "b", "cat/b": "a"},
    ],
)
def test_links_do_not_make_the_walk_longer(split: Path, links: dict[str, str]) -> None:
    for path, target in links.items():
        link(split / path, target)
    assert listed(split) == BOTH
    assert "linked to" in str(Listing(split).left_out)


def test_a_link_to_a_folder_elsewhere_is_followed_once(split: Path) -> None:
    store = split.parent / "store"
    (store / "more").mkdir(parents=True)
    (store / "more" / "x.png").touch()
    (store / "back").symlink_to(".")
    link(split / "cat" / "b", store)
    link(split / "cat" / "a", store)
    link(split / "cat" / "c", store / "more")
    assert listed(split)["cat"] == ["0.png", "1.png", "2.png", "a/more/x.png"]
    assert str(Listing(split).left_out) == (
        "2 linked to what is taken already (cat/b), 1 linked to a folder around the link (cat/a/back)"
    )


def test_a_class_folder_may_be_a_link(split: Path) -> None:
    (split / "cat").rename(split.parent / "elsewhere")
    link(split / "cat", split.parent / "elsewhere")
    link(split.parent / "elsewhere" / "loop", split)
    assert listed(split) == BOTH


def test_an_image_by_two_links_is_taken_once(split: Path) -> None:
    (split.parent / "x.png").touch()
    for name, target in {
        "x.png": "../../x.png",
        "y.png": "../../x.png",
        "z.png": "0.png",
        "sub/0.png": "../0.png",
    }.items():
        link(split / "cat" / name, target)
    assert listed(split)["cat"] == [*THREE, "x.png"]
    assert str(Listing(split).left_out) == "3 linked to what is taken already (cat/sub/0.png)"


def test_a_link_to_a_hidden_file_or_folder_is_taken_by_its_own_name(split: Path) -> None:
    store = split / "cat" / ".store"
    store.mkdir()
    (store / "1a2b").touch()
    link(split / "cat" / "x.png", ".store/1a2b")
    assert listed(split)["cat"] == [*THREE, "x.png"]


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("cat/0_of_dog.png", "../dog/0.png"),
        ("cat/dogs", "../dog"),
        ("wolf", "dog"),
        ("dog/more/cats", "../../cat"),
    ],
)
def test_an_image_in_two_classes_is_refused(split: Path, path: str, target: str) -> None:
    link(split / path, target)
    with pytest.raises(ConfigurationError, match=r"data\.root: .*; an image has one class: remove the link") as raised:
        Listing(split)
    assert str(split / path) in str(raised.value)
    assert os.path.realpath(split / path) in str(raised.value)


def test_an_image_that_two_classes_link_to_is_refused(split: Path) -> None:
    (split.parent / "x.png").touch()
    link(split / "cat" / "x.png", "../../x.png")
    link(split / "dog" / "y.png", "../../x.png")
    with pytest.raises(ConfigurationError, match=r"dog/y\.png of class dog leads to .*/x\.png, which class cat holds"):
        Listing(split)


@pytest.mark.parametrize("target", ["gone.png", "x.png"])
def test_an_image_whose_link_leads_nowhere_is_refused(split: Path, target: str) -> None:
    link(split / "cat" / "x.png", target)
    with pytest.raises(ConfigurationError, match=r"data\.root: .*cat/x\.png is a link that cannot be followed: "):
        Listing(split)


@pytest.mark.parametrize(
    "path",
    [
        "cat/.ipynb_checkpoints/0-checkpoint.png",
        "cat/.Trash/0.png",
        "cat/.Trash-1000/files/0.png",
        "cat/deep/._x.png",
        "cat/._0.png",
        "cat/__MACOSX/cat/0.png",
        "cat/@eaDir/0.png",
        "cat/lost+found/0.png",
        "cat/Thumbs.db",
        "cat/.0.png.swp",
        ".ipynb_checkpoints/0.png",
        "__MACOSX/cat/._0.png",
        "lost+found/0.png",
        "$RECYCLE.BIN/0.png",
    ],
)
def test_hidden_files_and_folders_are_left_out(split: Path, path: str) -> None:
    (split / path).parent.mkdir(parents=True, exist_ok=True)
    (split / path).touch()
    assert listed(split) == BOTH
    assert str(Listing(split).left_out).startswith("1 hidden (")


def test_hidden_folders_are_not_opened(split: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (split / "cat" / ".Trash").mkdir()
    deny(monkeypatch, ".Trash")
    assert listed(split) == BOTH


def deny(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let no folder of that name be read, by root neither."""
    scan = os.scandir

    def scandir(path: str) -> object:
        if Path(path).name == name:
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)


@pytest.mark.parametrize("name", ["train", "cat", "deep"])
def test_a_folder_that_cannot_be_read_is_named(split: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (split / "cat" / "deep").mkdir()
    deny(monkeypatch, name)
    with pytest.raises(
        ConfigurationError,
        match=rf"data\.root: the folder .*{name} cannot be read: Permission denied; make it readable",
    ):
        Listing(split)


def test_suffixes_are_taken_in_upper_case_too(split: Path) -> None:
    for index, suffix in enumerate(sorted(SUFFIXES)):
        (split / "cat" / f"a{index}{suffix}").touch()
        (split / "cat" / f"b{index}{suffix.upper()}").touch()
    listing = Listing(split)
    assert len(listing.files["cat"]) == 3 + 2 * len(SUFFIXES)
    assert not str(listing.left_out)


def test_what_is_no_file_is_left_out(split: Path) -> None:
    os.mkfifo(split / "cat" / "pipe.png")
    link(split / "cat" / "zero.png", "/dev/zero")
    (split / "cat" / "folder.png").mkdir()
    (split / "loose.png").touch()
    assert listed(split) == BOTH
    assert str(Listing(split).left_out) == (
        "2 neither files nor folders (cat/pipe.png), 1 outside the class folders (loose.png)"
    )


def test_the_order_is_that_of_code_points_whatever_the_file_system_says(
    split: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (split.parent / "store" / "x").mkdir(parents=True)
    for name in ("cat/B.png", "cat/a.png", "cat/a/0.png", "cat/a-b.png", "cat/é.png", "../store/x/0.png"):
        (split / name).parent.mkdir(exist_ok=True)
        (split / name).touch()
    for name in ("cat/l1", "cat/l2", "dog/m"):
        link(split / name, split.parent / "store" / ("x" if name[0] == "c" else "y"))
    (split.parent / "store" / "y").mkdir()
    scan, expected = os.scandir, listed(split)
    assert expected["cat"] == ["0.png", "1.png", "2.png", "B.png", "a-b.png", "a.png", "a/0.png", "l1/0.png", "é.png"]

    class Shuffled(list[os.DirEntry[str]]):
        def __enter__(self) -> Shuffled:
            random.shuffle(self)
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(os, "scandir", lambda path: Shuffled(scan(path)))
    for _ in range(5):
        assert listed(split) == expected


def test_what_is_left_out_fits_a_line() -> None:
    left_out = LeftOut("/data")
    assert not str(left_out)
    for index in range(20):
        left_out.add(f"ending in .{index:02}", f"/data/{index}")
    left_out.add("hidden", "/data/b\n\x1b[31m")
    left_out.add("hidden", "/data/c")
    assert str(left_out).startswith("2 hidden (b\\n\\x1b[31m), 1 ending in .00 (0), ")
    assert str(left_out).endswith(", 13 for other reasons")


def test_the_documentation_names_what_is_taken_and_what_is_hidden() -> None:
    page = (Path(__file__).parents[3] / "docs" / "experiment-file.md").read_text(encoding="utf-8")
    text = page[page.index("### Image files") :]
    assert {*re.findall(r"(?<=[ \n])\.\w+", text)} == SUFFIXES
    assert {name.lower() for name in re.findall(r"`([^`]+)`", text)} >= _HIDDEN
    assert f"{_MOST_PIXELS:,} pixels" in text
