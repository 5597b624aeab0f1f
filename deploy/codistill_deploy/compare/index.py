"""The index of a comparison's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from codistill.rundir.files import write_atomically
from codistill.rundir.layout import ComparisonLayout

__all__ = ["ComparisonIndex", "IndexedRun"]


class IndexedRun(BaseModel):
    """One run of a comparison, and its folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    seed: int
    path: str = Field(description="The run folder, relative to the comparison's, with `/` between its parts.")

    @field_validator("path")
    @classmethod
    def _inside(cls, value: str) -> str:
        path = PurePosixPath(value)
        if not path.parts or path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{value!r} does not lie inside the comparison folder; give a relative path without `..`")
        return value


class ComparisonIndex(BaseModel):
    """``comparison.json``: the runs of a comparison."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    experiment: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: tuple[IndexedRun, ...]
    left_out: Mapping[str, str] = Field(
        default_factory=dict[str, str], description="Methods whose needs the experiment does not meet, and why."
    )

    @staticmethod
    def path(folder: Path) -> Path:
        """Return the path of a comparison folder's index."""
        return ComparisonLayout(folder).index_file

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a comparison folder's index.

        Raises:
            OSError: there is no index, or it cannot be read.
            ValueError: it is not of this form.
        """
        path = cls.path(folder)
        content = path.read_bytes()
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{path}: {where + ': ' if where else ''}{first['msg']}") from error

    def write(self, folder: Path) -> Path:
        """Write the index into a comparison folder, creating the folder if need be, and return the file's path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = self.path(folder)
        write_atomically(path, self.model_dump_json(indent=2) + "\n")
        return path
