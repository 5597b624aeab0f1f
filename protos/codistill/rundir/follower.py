"""The history of a run while it goes on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from codistill.config.experiment import Experiment
from codistill.rundir import records
from codistill.rundir.history import Collector, History
from codistill.rundir.info import RunInfo
from codistill.rundir.layout import RunLayout

__all__ = ["Follower"]

_CHUNK = 2**20


class Follower:
    """Reads a run folder's records as they are written, in bounded memory.

    Of a series longer than the limit, evenly spaced measurements are kept, with the newest and the best. Spans of rounds are
    merged. Of events the newest are kept.

    Args:
        experiment: the run's.
        folder: the run's.
        limit: the most measurements of a series, spans of rounds, and events.
    """

    def __init__(self, experiment: Experiment, folder: Path, limit: int = 1000) -> None:
        self._layout = RunLayout(folder)
        self._collector = Collector(experiment, limit)
        self._bytes = dict.fromkeys(self._layout.record_files, 0)
        self._lines = dict.fromkeys(self._layout.record_files, 0)

    @property
    def written(self) -> str:
        """The version of the records written so far; it differs where the history does."""
        return _version(map(_size, self._bytes))

    @property
    def version(self) -> str:
        """The version of the records read so far; :attr:`written`, once all are read."""
        return _version(self._bytes.values())

    def advance(self) -> History:
        """Read the records written since the last call, and return the history so far.

        Raises:
            ValueError: a line of the records, or ``run.json``, is not of its form.
            OSError: a file cannot be read.
        """
        for path in self._bytes:
            while self._read_more(path):
                pass
        return self._collector.history(RunInfo.read(self._layout.info_file))

    def _read_more(self, path: Path) -> bool:
        """Read the next lines of a file; return whether there were any."""
        if _size(path) <= self._bytes[path]:
            return False
        with path.open("rb") as file:
            file.seek(self._bytes[path])
            content = file.read(_CHUNK)
        lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
        for line in lines:
            self._collector.add(records.parse(line, path, self._lines[path] + 1))
            self._bytes[path] += len(line)
            self._lines[path] += 1
        return bool(lines)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _version(sizes: Iterable[int]) -> str:
    return "-".join(map(str, sizes))
