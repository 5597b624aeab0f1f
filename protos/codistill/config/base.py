"""The base of every section of an experiment file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from codistill.config.errors import format_value

__all__ = ["OPERATIONAL", "REFERENCE", "Section", "require_json_values", "require_whole_path"]

OPERATIONAL: dict[str, Any] = {"operational": True}
"""Marks a field that may differ between the processes of a run."""

REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""`package.module:callable`."""


class Section(BaseModel):
    """A section. It rejects unknown keys, and its fields do not change."""

    # Strict, as true and "3" would else convert to numbers. Fields with tuples are not, as YAML has lists only.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)


def require_json_values(value: dict[str, Any]) -> dict[str, Any]:
    """Return arguments for a user's callable, which must be JSON to be written into a run folder and compared.

    Raises:
        ValueError: one has no JSON form.
    """
    for key, item in value.items():
        try:
            json.dumps(item, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{key}: {format_value(item)} is not allowed; allowed are text, finite numbers, true, false, null, "
                "lists and maps of them"
            ) from error
    return value


def require_whole_path(value: str) -> str:
    """Return a path that means the same to every process, on any machine.

    Raises:
        ValueError: it begins with `~`, which a shell expands and an experiment file does not.
    """
    if value == "~" or value.startswith("~/"):
        try:
            whole = str(Path(value).expanduser())
        except RuntimeError:  # this user has no home
            whole = f"/HOME{value[1:]}"
        raise ValueError(
            f"`~` is not expanded here; write the whole path, {whole}, or ./{value} for a folder of that name"
        )
    return value
