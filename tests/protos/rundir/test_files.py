"""Files that are either wholly there or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from codistill.rundir.files import write_atomically


def test_what_is_written_is_there_wholly_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \udc80")
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new"
