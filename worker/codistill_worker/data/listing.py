"""Find the image files of a split's class folders, and count what is left out."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from codistill.process.printable import printable
from codistill_worker.errors import ConfigurationError

__all__ = ["SUFFIXES", "LeftOut", "Listing"]

SUFFIXES = frozenset(
    [
        ".apng",
        ".avif",
        ".bmp",
        ".dib",
        ".gif",
        ".j2c",
        ".j2k",
        ".jfif",
        ".jp2",
        ".jpc",
        ".jpe",
        ".jpeg",
        ".jpf",
        ".jpg",
        ".jpx",
        ".mpo",
        ".pbm",
        ".pgm",
        ".png",
        ".pnm",
        ".ppm",
        ".tif",
        ".tiff",
        ".webp",
    ]
)
"""Endings of image files. The list is the same on every machine, so that all count the same samples."""

_HIDDEN = frozenset(
    {
        "$recycle.bin",
        "@eadir",
        "__macosx",
        "desktop.ini",
        "ehthumbs.db",
        "lost+found",
        "system volume information",
        "thumbs.db",
    }
)
_MOST_REASONS = 8


class LeftOut:
    """The files of a split that are left out: counts by reason, each with an example."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._counts: dict[str, int] = {}
        self._examples: dict[str, str] = {}

    def add(self, reason: str, path: str) -> None:
        """Count a file or folder; the example is the first path in the order of code points."""
        self._counts[reason] = self._counts.get(reason, 0) + 1
        self._examples[reason] = min(path, self._examples.get(reason, path))

    def __str__(self) -> str:
        """`2 hidden (cat/.DS_Store), 1 ending in .heic (cat/a.heic)`; empty if nothing is left out."""
        ordered = sorted(self._counts, key=lambda reason: (-self._counts[reason], reason))
        parts = [
            f"{self._counts[reason]:,} {printable(reason)} "
            f"({printable(os.path.relpath(self._examples[reason], self._folder))})"
            for reason in ordered[:_MOST_REASONS]
        ]
        if rest := sum(self._counts[reason] for reason in ordered[_MOST_REASONS:]):
            parts.append(f"{rest:,} for other reasons")
        return ", ".join(parts)


class Listing:
    """The images of a split, found once when this is made.

    Links are followed. A folder or an image that is reached again, by a link, is taken once. So every walk ends, also among
    links to a folder around them. Folders that are reached without a link come first; the rest follow in the order of
    their paths. Names that begin with a dot and those of system folders are hidden, and never opened.

    Attributes:
        files: the paths by class, both in the order of code points.
        left_out: what is not taken.
        places: the paths of the folders that images were taken from, by their real paths.
        linked: the paths of the images that were taken by a link, by their real paths.
    """

    def __init__(self, folder: Path) -> None:
        """Walk the split's folder.

        Raises:
            ConfigurationError: a folder cannot be read, an image's link leads nowhere, or an image is in two classes.
        """
        self.left_out = LeftOut(str(folder))
        self._real_path = os.path.realpath(folder)
        self.places: dict[str, str] = {}
        self.linked: dict[str, str] = {}
        self._class_of: dict[str, str] = {}  # by the real path of each folder that was walked
        self._folder_links: list[tuple[str, str]] = []  # path and class
        self._file_links: list[tuple[str, str]] = []
        self.files: dict[str, list[str]] = {name: [] for name in sorted(self._class_names(str(folder)))}
        for name in self.files:
            path = f"{folder}/{name}"
            if Path(path).is_symlink():
                self._folder_links.append((path, name))
            else:
                self._walk(path, os.path.realpath(path), name)
        while self._folder_links:
            links, self._folder_links = sorted(self._folder_links), []
            for path, name in links:
                self._follow(path, name)
        self._take_linked_files()
        for paths in self.files.values():
            paths.sort()

    def shared_with(self, other: Listing) -> str:
        """Return an example of what two splits share, through a link or as one folder: `img/test/cat is img/train/cat`; or ""."""
        for path, names in other.places.items():
            if (ours := self.places.get(path)) is not None:
                return f"{names} is {ours}"
        for mine, theirs in ((self, other), (other, self)):
            for target, path in theirs.linked.items():
                if os.path.dirname(target) in mine.places:  # noqa: PTH120 - as text, as all paths here
                    return f"{path} leads to {target}"
        both = sorted(self.linked.keys() & other.linked.keys())
        return f"{other.linked[both[0]]} and {self.linked[both[0]]} lead to {both[0]}" if both else ""

    def _class_names(self, folder: str) -> Iterator[str]:
        for entry in _entries(folder):
            if _is_hidden(entry.name):
                self.left_out.add("hidden", entry.path)
            elif os.path.isdir(entry.path):  # noqa: PTH112 - Path.is_dir raises PermissionError
                yield entry.name
            else:
                self.left_out.add("outside the class folders", entry.path)

    def _follow(self, path: str, name: str) -> None:
        """Walk the folder that a link leads to, unless the link or the split is inside that folder."""
        target = os.path.realpath(path)
        place = os.path.realpath(os.path.dirname(path))  # noqa: PTH120 - as text, as all paths here
        if any(os.path.commonpath([inner, target]) == target for inner in (place, self._real_path)):
            self.left_out.add("linked to a folder around the link", path)
        else:
            self._walk(path, target, name)

    def _walk(self, path: str, real_path: str, name: str) -> None:
        pending = [(path, real_path)]
        while pending:
            path, real_path = pending.pop()
            if (known := self._class_of.get(real_path)) is not None:
                if known != name:
                    raise _in_two_classes(path, known, name)
                self.left_out.add("linked to what is taken already", path)
                continue
            self._class_of[real_path] = name
            self.places[real_path] = path
            for entry in _entries(path):
                if _is_hidden(entry.name):
                    self.left_out.add("hidden", entry.path)
                elif entry.is_symlink():
                    self._add_link(entry, name)
                elif entry.is_dir(follow_symlinks=False):
                    pending.append((f"{path}/{entry.name}", f"{real_path}/{entry.name}"))
                elif self._is_image(entry.path, regular=entry.is_file(follow_symlinks=False)):
                    self.files[name].append(f"{path}/{entry.name}")

    def _add_link(self, entry: os.DirEntry[str], name: str) -> None:
        try:
            mode = entry.stat().st_mode
        except OSError as error:
            if _suffix(entry.name) in SUFFIXES:
                raise ConfigurationError(
                    f"data.root: {entry.path} is a link that cannot be followed: {error.strerror}; "
                    "restore the file it leads to, or remove it"
                ) from error
            self.left_out.add("linked to nothing", entry.path)
            return
        if stat.S_ISDIR(mode):
            self._folder_links.append((entry.path, name))
        elif self._is_image(entry.path, regular=stat.S_ISREG(mode)):
            self._file_links.append((entry.path, name))

    def _is_image(self, path: str, *, regular: bool) -> bool:
        suffix = _suffix(path)
        if suffix not in SUFFIXES:
            self.left_out.add(f"ending in {suffix}" if suffix else "without a suffix", path)
        elif not regular:
            self.left_out.add("neither files nor folders", path)
        else:
            return True
        return False

    def _take_linked_files(self) -> None:
        taken: dict[str, str] = {}
        for path, name in sorted(self._file_links):
            target = os.path.realpath(path)
            folder, file = os.path.split(target)
            known = taken.get(target)
            if known is None and _suffix(file) in SUFFIXES and not _is_hidden(file):
                known = self._class_of.get(folder)
            if known is None:
                taken[target] = name
                self.linked[target] = path
                self.files[name].append(path)
            elif known == name:
                self.left_out.add("linked to what is taken already", path)
            else:
                raise _in_two_classes(path, known, name)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise ConfigurationError(
            f"data.root: the folder {folder} cannot be read: {error.strerror}; make it readable, or remove it"
        ) from error


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _HIDDEN


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()  # noqa: PTH122 - a large set has over a million paths


def _in_two_classes(path: str, known: str, name: str) -> ConfigurationError:
    return ConfigurationError(
        f"data.root: {path} of class {name} leads to {os.path.realpath(path)}, which class {known} holds; "
        "an image has one class: remove the link, or copy what it leads to"
    )
