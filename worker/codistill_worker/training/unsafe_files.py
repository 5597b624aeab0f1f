"""Files that hold objects besides tensors: which they are, and how a user keeps the weights alone."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import torch

__all__ = ["OBJECTS", "objects_in", "way_out"]

OBJECTS = "it is damaged, or holds objects besides tensors, which are never unpickled"
"""Why a file cannot be read, if torch says no more."""

_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
_COMMANDS = frozenset({"os", "posix", "nt", "sys", "subprocess", "runpy", "shutil"})
"""Modules whose functions no file of weights needs, and harmful ones call."""

_EVALUATING = frozenset(
    f"{module}.{name}"
    for module in ("builtins", "__builtin__")
    for name in ("__import__", "compile", "eval", "exec", "execfile", "getattr", "open")
)

_KEEP = (
    "import sys, torch; "
    "k = lambda v: v.detach() if isinstance(v, torch.Tensor) else k(v.state_dict()) if isinstance(v, torch.nn.Module) "
    'else torch.as_tensor(v.astype(v.dtype.newbyteorder("="))) if type(v).__name__ == "ndarray" and v.dtype.kind in "biuf" '
    "else k({str(n): x for n, x in enumerate(v)}) if isinstance(v, (list, tuple)) "
    "else {n: w for n, x in v.items() if (w := k(x)) is not None} or None if isinstance(v, dict) else None; "
    'w = k(torch.load(sys.argv[1], map_location="cpu", weights_only=False)); '
    'torch.save(w, sys.argv[2]) if w is not None else sys.exit("it holds neither tensors nor arrays")'
)
"""Python code that keeps the tensors and arrays of a file, by their keys; it runs whatever code the file holds."""


def objects_in(file: Path, error: Exception) -> list[str]:
    """Return the names of the classes and functions for which torch refused a file; none if it is only damaged."""
    refused = _GLOBAL.findall(str(error))
    if not refused:
        return []
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # noqa: BLE001 - an older format, which torch does not look through
        found = []
    return sorted({*refused, *found})


def way_out(file: Path, objects: list[str], allowed: str) -> str:
    """Return what to do with a file that holds objects besides tensors; `allowed` is what may be given instead."""
    if any(name.partition(".")[0] in _COMMANDS or name in _EVALUATING for name in objects):
        return f"{OBJECTS}; {allowed}"
    kept = file.with_name(f"{file.stem}-weights.pth")
    line = shlex.join(["python", "-c", _KEEP, str(file), str(kept)])
    return (
        f"it holds objects besides tensors, which are never unpickled: {', '.join(objects[:3])}"
        f"{' and others' if len(objects) > 3 else ''}; give {kept} instead, to which this line writes the "
        f"weights alone; it runs the file's code, so use it only for a file that you trust: {line}"
    )
