"""A user's own server half, whose mistakes are told by the experiment's field."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch

from codistill.config.methods import Custom
from codistill.methods.aggregator import Aggregator, Output, RoundInputs, Targets
from codistill.process import plugins
from codistill.process.plugins import LoadError

__all__ = ["load"]

_NEEDED = ("heavy", "student", "teacher", "targets")


def load(settings: Custom) -> Aggregator:
    """Returns what the experiment's callable makes of its parameters.

    Its `targets` raises LoadError too, where the user's raises an error or returns what cannot be sent.

    Raises:
        LoadError: it cannot be imported, does not take the parameters, or returns no server half.
    """
    half = plugins.call(settings.server, "distillation.server", settings.parameters)
    missing = [name for name in _NEEDED if not hasattr(half, name)]
    if missing:
        raise LoadError(
            f"distillation.server: {settings.server!r} returned {type(half).__name__}, which lacks {', '.join(missing)}; "
            f"a server half has {', '.join(_NEEDED)}"
        )
    return _Told(cast("Aggregator", half), f"distillation.server: {settings.server!r}")


class _Told:
    """A half that names itself where it fails: nobody knows a user's code by its errors alone."""

    def __init__(self, half: Aggregator, name: str) -> None:
        self.heavy = half.heavy
        self.student: Mapping[str, Output] = half.student
        self.teacher: Mapping[str, Output] = half.teacher
        self._half = half
        self._name = name

    def targets(self, gathered: RoundInputs) -> Targets:
        """Returns the targets that the user's half makes of one round."""
        try:
            targets = self._half.targets(gathered)
        except Exception as error:
            raise LoadError(f"{self._name}: {plugins.explain_error(error)}") from error
        problem = next(_problems(targets, gathered), None)
        if problem is not None:
            raise LoadError(f"{self._name}: {problem}")
        return targets


def _problems(targets: Any, gathered: RoundInputs) -> Iterator[str]:
    """Yields why something cannot be sent."""
    if not isinstance(targets, Targets):
        yield f"targets returned {type(targets).__name__}; expected codistill_server.methods.Targets"
        return
    each = targets.each or {}
    for student in gathered.students:
        if targets.shared is None and student not in each:
            yield f"there are targets for {', '.join(each) or 'nobody'}, and none for {student!r}; give it {{}} at least"
    named = {"shared": targets.shared or {}, "state": targets.state}
    named |= {f"each[{student!r}]": arrays for student, arrays in each.items()}
    for place, arrays in named.items():
        for name, value in cast("Mapping[str, Any]", arrays).items():
            if not isinstance(value, torch.Tensor):
                yield f"{place}[{name!r}] is a {type(value).__name__}; expected a torch.Tensor"
            elif not bool(torch.isfinite(value).all()):
                yield f"{place}[{name!r}] has values that are not finite; nobody can learn from them"
