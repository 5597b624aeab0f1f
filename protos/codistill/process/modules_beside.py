"""Modules beside an experiment: its folder is searched last, and only where the experiment names a module.

The folder may hold anything, such as a `queue.py`, so no file in it may stand for a module of Python or of a library.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["add_folder", "search", "shadow"]

_folders: list[Path] = []


def add_folder(folder: Path) -> None:
    """Add a folder to those that :func:`search` puts on Python's path."""
    if folder.resolve() not in _folders:
        _folders.append(folder.resolve())


def search() -> None:
    """Append the added folders to Python's path, behind everything that is installed."""
    for folder in map(str, _folders):
        if folder not in sys.path:
            sys.path.append(folder)
    importlib.invalidate_caches()  # a module may have been written since its folder was listed


def shadow(module: str) -> tuple[str, Path] | None:
    """Return the file that Python takes for a module and the other one beside the experiment; None where there is no other.

    Args:
        module: the module's dotted name; only a file of its first part, or that of a folder which holds the rest, counts.
    """
    top, _, rest = module.partition(".")
    beside = [path for folder in _folders for path in _candidates(folder, top, rest)]
    if not beside:
        return None
    found = list(_found(top))
    if not found or any(_same(Path(each), path) for each in found for path in beside):
        return None
    return found[0], beside[0]


def _candidates(folder: Path, top: str, rest: str) -> Iterator[Path]:
    """Yield the files and folders from which Python could load a module in a folder."""
    suffixes = importlib.machinery.all_suffixes()
    first = rest.partition(".")[0]
    package = folder / top
    inside = ["__init__", first] if first else ["__init__"]
    if any((package / f"{name}{suffix}").is_file() for name in inside for suffix in suffixes) or (
        first and (package / first).is_dir()
    ):
        yield package
    yield from (path for suffix in suffixes if (path := folder / f"{top}{suffix}").is_file())


def _found(top: str) -> Iterator[str]:
    """Yield the places from which Python loads a module, without loading it."""
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # loaded already, and without a specification
        file = getattr(sys.modules.get(top), "__file__", None)
        yield from [file] if file else []
        return
    if spec is None:
        return
    if spec.submodule_search_locations is not None:
        yield from spec.submodule_search_locations
    elif spec.origin is not None:
        yield f"Python's own ({spec.origin})" if spec.origin in ("built-in", "frozen") else spec.origin


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()
