"""Lines of the workers' logs on the run's data and the user's code: every worker logs the same, and each is shown once."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

__all__ = ["WorkerLines"]

_SHOWN = re.compile(rb"\d\d:\d\d:\d\d (INFO|WARNING) ((?:data\.|module ).*)")
_MOST_BYTES = 2**20


class WorkerLines:
    """Follows the logs of a run's workers.

    Args:
        logs: the files, which need not exist; what they hold already is of earlier starts.
    """

    def __init__(self, logs: Iterable[Path]) -> None:
        self._read = {log: _size(log) for log in logs}
        self._shown: set[bytes] = set()

    def new(self) -> list[str]:
        """Return the lines to show that no worker has logged before."""
        lines: list[str] = []
        for log, start in self._read.items():
            if _size(log) <= start:
                continue
            try:
                with log.open("rb") as file:
                    file.seek(start)
                    content = file.read(_MOST_BYTES)
            except OSError:  # what happens to the run's folder is noticed elsewhere
                continue
            whole = content.rpartition(b"\n")[0]
            self._read[log] = start + (len(whole) + 1 if whole else len(content) if len(content) == _MOST_BYTES else 0)
            for line in whole.splitlines():
                found = _SHOWN.fullmatch(line)
                if found is not None and found[2] not in self._shown:
                    self._shown.add(found[2])
                    text = found[2].decode(errors="replace")
                    lines.append(f"warning: {text}" if found[1] == b"WARNING" else text)
        return lines


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
