"""``run.json``: the facts of a run that its experiment does not hold."""

from __future__ import annotations

import json
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from codistill import __version__
from codistill.rundir.files import write_atomically

__all__ = ["Mode", "RunInfo", "write_info"]

_PACKAGES = ("torch", "grpcio", "protobuf", "numpy")

Mode: TypeAlias = Literal["grpc", "in-process"]
"""How a run's students reach the coordinator."""


class RunInfo(BaseModel):
    """The facts of a run that its experiment does not hold. Every field may be missing."""

    model_config = ConfigDict(frozen=True)

    created: datetime | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    command: tuple[str, ...] = ()
    mode: Mode | None = None
    machine: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> RunInfo:
        """Read a run's ``run.json``; all fields are missing where there is no such file.

        Raises:
            ValueError: the file is not of this form.
        """
        if not path.exists():
            return cls()
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{path}: {where + ': ' if where else ''}{first['msg']}") from error


def write_info(path: Path, mode: Mode) -> None:
    """Write the facts of a run that this process starts.

    Raises:
        OSError: it could not be written.
    """
    versions = {"codistill": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    about = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "mode": mode,
        "command": ["codistill", *sys.argv[1:]],
        "versions": versions,
        "machine": {"system": platform.platform(), "cpus": os.cpu_count() or 0},
    }
    write_atomically(path, json.dumps(about, indent=2) + "\n")
