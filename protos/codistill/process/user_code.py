"""Which code of the user's own a process uses, so that a change between two starts is noticed.

That is every loaded module that is neither installed nor codistill's, and what those modules import. An import inside a
function counts from the start. An import whose name is computed counts once its module is loaded.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

__all__ = ["digests"]

_OURS = frozenset({"codistill", "codistill_deploy", "codistill_server", "codistill_worker", "__main__", "__mp_main__"})
_INSTALLED = tuple(
    f"{folder}/" for name in ("stdlib", "platstdlib", "purelib", "platlib") if (folder := sysconfig.get_path(name))
)
_INSTALLED_ELSEWHERE = frozenset({"site-packages", "dist-packages"})
_IMPORTERS = frozenset({"import_module", "__import__"})


def digests() -> dict[str, str]:
    """Return the SHA-256 of the source of each module of the user's own, by its name."""
    found: dict[str, str] = {}
    pending = sorted(_loaded())
    while pending:
        name, file = pending.pop(0)
        if name in found:
            continue
        try:
            source = file.read_bytes()
        except OSError:  # it was deleted since, or lies in an archive
            continue
        found[name] = hashlib.sha256(source).hexdigest()
        package = name if file.stem == "__init__" else name.rpartition(".")[0]
        for imported in _imports(source, package):
            pending += (each for each in _files_of(imported) if each[0] not in found)
    return found


def _loaded() -> Iterator[tuple[str, Path]]:
    """Yield name and file of each loaded module of the user's own."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and name.partition(".")[0] not in _OURS and not _is_installed(file):
            yield name, Path(file)


@functools.lru_cache(4096)
def _imports(source: bytes, package: str) -> tuple[str, ...]:
    """Return the dotted names that a module imports anywhere in its source, or could: of `from a import b` also a.b.

    Args:
        source: the module's; one that is no Python imports nothing.
        package: the dotted name that its relative imports begin at.
    """
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ()
    names: list[str] = []
    for node in nodes:
        match node:
            case ast.Import():
                names += (alias.name for alias in node.names)
            case ast.ImportFrom():
                base = _absolute(node.module or "", node.level, package)
                names += (f"{base}.{alias.name}" for alias in node.names)
            case ast.Call(
                func=ast.Name(id=called) | ast.Attribute(attr=called), args=[ast.Constant(value=str(name)), *_]
            ) if called in _IMPORTERS:
                stem = name.lstrip(".")
                names.append(_absolute(stem, len(name) - len(stem), package))
            case _:
                pass
    return tuple(dict.fromkeys(names))


def _absolute(name: str, level: int, package: str) -> str:
    """Return the whole name of a module that is imported relative to a package, with `level` dots before it."""
    if not level:
        return name
    base = package.split(".")[: len(package.split(".")) - level + 1]
    return ".".join([*base, name] if name else base)


def _files_of(name: str) -> Iterator[tuple[str, Path]]:
    """Yield name and file of a module and of the packages around it, as Python finds them; none of what is installed."""
    top, *rest = name.split(".")
    if top in sys.stdlib_module_names or top in _OURS:
        return
    for folder in map(Path, sys.path):
        place = folder / top
        if not (place.is_dir() or place.with_name(f"{top}.py").is_file()):
            continue
        if _is_installed(str(place)):
            return
        whole = top
        for part in (*rest, ""):
            yield from ((whole, file) for file in (place / "__init__.py", Path(f"{place}.py")) if file.is_file())
            place, whole = place / part, f"{whole}.{part}"
        return


def _is_installed(file: str) -> bool:
    return file.startswith(_INSTALLED) or not _INSTALLED_ELSEWHERE.isdisjoint(Path(file).parts)
