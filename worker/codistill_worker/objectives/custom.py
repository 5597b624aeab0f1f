"""A user's own worker half."""

from __future__ import annotations

from typing import cast

from codistill import references
from codistill.distillation import Custom
from codistill.references import LoadError
from codistill_worker.errors import ConfigurationError
from codistill_worker.objectives.mechanism import Subject, WorkerHalf

__all__ = ["load"]

_NEEDED = ("network", "extra", "publishes", "measures_held_out", "loss")


def load(settings: Custom, subject: Subject) -> WorkerHalf:
    """Returns what the experiment's callable makes of the student, given as `subject`, and of its parameters.

    Raises:
        ConfigurationError: it cannot be imported, does not take the parameters, or returns no worker half.
    """
    try:
        half = references.call(settings.worker, "distillation.worker", {"subject": subject, **settings.parameters})
    except LoadError as error:
        raise ConfigurationError(str(error)) from error.__cause__
    missing = [name for name in _NEEDED if not hasattr(half, name)]
    if missing:
        raise ConfigurationError(
            f"distillation.worker: {settings.worker!r} returned {type(half).__name__}, which lacks {', '.join(missing)}; a "
            f"worker half has {', '.join(_NEEDED)}"
        )
    return cast("WorkerHalf", half)
