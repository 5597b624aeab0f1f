"""Which code of the user's own a process has loaded, so that a change between two starts is noticed."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from pathlib import Path

__all__ = ["digests"]

_OURS = frozenset({"codistill", "codistill_deploy", "codistill_server", "codistill_worker", "__main__", "__mp_main__"})
_INSTALLED = tuple(
    f"{folder}/" for name in ("stdlib", "platstdlib", "purelib", "platlib") if (folder := sysconfig.get_path(name))
)
_INSTALLED_ELSEWHERE = frozenset({"site-packages", "dist-packages"})


def digests() -> dict[str, str]:
    """Return the SHA-256 of the source of each loaded module that is neither installed nor codistill's, by its name."""
    found: dict[str, str] = {}
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or name.partition(".")[0] in _OURS:
            continue
        if file.startswith(_INSTALLED) or _INSTALLED_ELSEWHERE.intersection(Path(file).parts):
            continue
        try:
            found[name] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        except OSError:  # it was deleted since, or lies in an archive
            continue
    return found
