"""A user's own objective; its mistakes are reported by the experiment's field."""

from __future__ import annotations

from typing import Any, cast

from codistill.config.methods import Custom
from codistill.methods import Loss, Objective, Step, StudentContext
from codistill.process import plugins
from codistill_worker.errors import ConfigurationError, is_devices_fault

__all__ = ["objective"]

_ATTRIBUTES = ("network", "extra", "publishes", "measures_held_out", "loss")


def objective(settings: Custom, context: StudentContext) -> Objective:
    """Return the result of the experiment's callable, called with `context` and the experiment's parameters.

    Its `loss` raises ConfigurationError where the user's raises an error or returns what cannot be minimised.

    Raises:
        LoadError: the callable cannot be imported, does not take the parameters, or raised an error.
        ConfigurationError: it returned something that is no objective.
    """
    made = plugins.call(settings.worker, "distillation.worker", {"context": context, **settings.parameters})
    field = f"distillation.worker: {settings.worker!r}"
    with plugins.users_code(field, ConfigurationError, spare=is_devices_fault):
        missing = [name for name in _ATTRIBUTES if not hasattr(made, name)]
    if missing:
        raise ConfigurationError(
            f"{field} returned {type(made).__name__}, which lacks {', '.join(missing)}; an objective has {', '.join(_ATTRIBUTES)}"
        )
    return _CheckedObjective(cast("Objective", made), field)


class _CheckedObjective:
    """A user's objective, `checked`, whose losses are checked, and whose errors name the experiment's field."""

    def __init__(self, checked: Objective, field: str) -> None:
        self.network = checked.network
        self.extra = checked.extra
        self.publishes = checked.publishes
        self.measures_held_out = checked.measures_held_out
        self.checked = checked
        self._field = field

    def loss(self, step: Step) -> Loss:
        """Return the user's loss of one step."""
        with plugins.users_code(self._field, ConfigurationError, spare=is_devices_fault):
            loss: Any = self.checked.loss(step)
        if not isinstance(loss, Loss):
            raise ConfigurationError(
                f"{self._field}: loss returned {type(loss).__name__}; expected codistill.methods.Loss"
            )
        if loss.total.ndim or not loss.total.requires_grad:
            problem = f"has shape {list(loss.total.shape)}" if loss.total.ndim else "has no gradient"
            raise ConfigurationError(
                f"{self._field}: the loss's total {problem}; expected a scalar that depends on the outputs"
            )
        return loss
