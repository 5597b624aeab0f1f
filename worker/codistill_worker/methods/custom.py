"""A user's own worker half, whose mistakes are told by the experiment's field."""

from __future__ import annotations

from typing import Any, cast

from codistill.config.methods import Custom
from codistill.methods.objective import Loss, Objective, Step, StudentContext
from codistill.process import plugins
from codistill.process.plugins import LoadError
from codistill_worker.errors import ConfigurationError, is_out_of_memory
from codistill_worker.plugins import explained

__all__ = ["load"]

_NEEDED = ("network", "extra", "publishes", "measures_held_out", "loss")


def load(settings: Custom, subject: StudentContext) -> Objective:
    """Returns what the experiment's callable makes of the student, given as `subject`, and of its parameters.

    Its `loss` raises ConfigurationError too, where the user's raises an error or returns what cannot be minimised.

    Raises:
        ConfigurationError: it cannot be imported, does not take the parameters, or returns no worker half.
    """
    try:
        half = plugins.call(settings.worker, "distillation.worker", {"subject": subject, **settings.parameters})
    except LoadError as error:
        raise ConfigurationError(str(error)) from error.__cause__
    missing = [name for name in _NEEDED if not hasattr(half, name)]
    if missing:
        raise ConfigurationError(
            f"distillation.worker: {settings.worker!r} returned {type(half).__name__}, which lacks {', '.join(missing)}; a "
            f"worker half has {', '.join(_NEEDED)}"
        )
    return _Told(cast("Objective", half), f"distillation.worker: {settings.worker!r}")


class _Told:
    """A half that names itself where it fails: nobody knows a user's code by its errors alone."""

    def __init__(self, half: Objective, name: str) -> None:
        self.network = half.network
        self.extra = half.extra
        self.publishes = half.publishes
        self.measures_held_out = half.measures_held_out
        self._half = half
        self._name = name

    def loss(self, step: Step) -> Loss:
        """Returns the loss that the user's half makes of one step."""
        try:
            loss: Any = self._half.loss(step)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise ConfigurationError(f"{self._name}: {explained(error)}") from error
        if not isinstance(loss, Loss):
            raise ConfigurationError(
                f"{self._name}: loss returned {type(loss).__name__}; expected codistill_worker.methods.Loss"
            )
        if loss.total.ndim or not loss.total.requires_grad:
            what = f"has shape {list(loss.total.shape)}" if loss.total.ndim else "has no gradient"
            raise ConfigurationError(
                f"{self._name}: the loss's total {what}; expected a scalar that depends on the outputs"
            )
        return loss
