"""A user's own server half."""

from __future__ import annotations

from typing import cast

from codistill import references
from codistill.distillation import Custom
from codistill.references import LoadError
from codistill_server.methods.mechanism import ServerHalf

__all__ = ["load"]

_NEEDED = ("heavy", "student", "teacher", "targets")


def load(settings: Custom) -> ServerHalf:
    """Returns what the experiment's callable makes of its parameters.

    Raises:
        LoadError: it cannot be imported, does not take the parameters, or returns no server half.
    """
    half = references.call(settings.server, "distillation.server", settings.parameters)
    missing = [name for name in _NEEDED if not hasattr(half, name)]
    if missing:
        raise LoadError(
            f"distillation.server: {settings.server!r} returned {type(half).__name__}, which lacks {', '.join(missing)}; "
            f"a server half has {', '.join(_NEEDED)}"
        )
    return cast("ServerHalf", half)
