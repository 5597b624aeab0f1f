"""The environment of a run's processes, which load nothing from the working folder by themselves."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["FOLDERS_VARIABLE", "isolated"]

FOLDERS_VARIABLE = "CODISTILL_MODULES"
"""The environment variable that names to a process the folders with the user's own modules."""


def isolated(environment: Mapping[str, str], folders: Sequence[Path], *, last: Sequence[Path] = ()) -> dict[str, str]:
    """Return an environment in which Python's path begins with what is installed.

    Python would put the working folder first, and so does an empty part of PYTHONPATH. What is in there, a `queue.py` for
    example, would then stand for Python's own, in these processes and in those that they start.

    Texts hash alike in all of them, so that the order of a set is the same; a PYTHONHASHSEED of the user's stays.

    Args:
        environment: what the processes get besides.
        folders: with the user's own modules; searched last, and only where the experiment names a module.
        last: folders that are moved from PYTHONPATH to the end of `folders`.
    """
    parts = [part for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part]
    moved = [each for each in last if any(Path(part).resolve() == each.resolve() for part in parts)]
    kept = [part for part in parts if Path(part).resolve() not in [each.resolve() for each in moved]]
    searched = dict.fromkeys(str(folder.absolute()) for folder in (*folders, *moved))
    return {
        **{name: value for name, value in environment.items() if name != "PYTHONPATH"},
        **({"PYTHONPATH": os.pathsep.join(kept)} if kept else {}),
        "PYTHONSAFEPATH": "1",
        "PYTHONHASHSEED": environment.get("PYTHONHASHSEED") or "0",
        FOLDERS_VARIABLE: os.pathsep.join(searched),
    }
