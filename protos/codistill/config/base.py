"""What every section of an experiment file is made of."""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import BaseModel, ConfigDict

from codistill.config.errors import shown

__all__ = ["OPERATIONAL", "REFERENCE", "Section", "plain_values"]

OPERATIONAL: dict[str, Any] = {"operational": True}
"""Marks a field that may differ between the processes of a run."""

REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""`package.module:callable`."""


class Section(BaseModel):
    """A section: unknown keys are refused, and nothing in it changes."""

    # Strict: true and "3" are no numbers, however well they would convert. YAML has lists only, so tuples are not.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)


def plain_values(value: dict[str, Any]) -> dict[str, Any]:
    """Checks that arguments for somebody's callable can be written down and compared.

    Raises:
        ValueError: one cannot.
    """
    for key, item in value.items():
        try:
            json.dumps(item, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{key}: {shown(item)} is not allowed; allowed are text, finite numbers, true, false, null, "
                "lists and maps of them"
            ) from error
    return value
