"""Types of the built-in models' arguments, against which an experiment's values are checked."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

__all__ = ["Count", "Rate", "Width"]

Count = Annotated[int, Field(ge=1, le=1000)]
"""Layers, heads, pixels."""

Width = Annotated[int, Field(ge=1, le=65_536)]
"""Units or channels."""

Rate = Annotated[float, Field(ge=0, lt=1)]
"""Share of activations that dropout sets to 0."""
