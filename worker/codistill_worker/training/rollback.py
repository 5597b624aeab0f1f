"""Puts back what a forward pass changes of a student: buffers, such as batch statistics, and extra states."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["Moved", "Rollback"]


@dataclass(frozen=True)
class Moved:
    """Copies of what a forward pass changes, in the order of :class:`Rollback`'s lists."""

    buffers: list[torch.Tensor]
    states: list[Any]


class Rollback:
    """Copies what a forward pass changes of modules, and puts it back.

    Args:
        root: holds the modules.
    """

    def __init__(self, root: nn.Module) -> None:
        # By owner and name, as a module may put a new tensor in the place of its buffer.
        self._buffers = [(module, name) for module in root.modules() for name, _ in module.named_buffers(recurse=False)]
        self._stateful = [module for module in root.modules() if _has_extra_state(module)]

    def keep(self) -> Moved:
        """Return copies of the present values."""
        buffers: list[torch.Tensor] = [getattr(module, name).detach().clone() for module, name in self._buffers]
        return Moved(buffers, [copy.deepcopy(module.get_extra_state()) for module in self._stateful])

    def restore(self, before: Moved) -> None:
        """Put the values back."""
        with torch.no_grad():
            for (module, name), value in zip(self._buffers, before.buffers, strict=True):
                current: torch.Tensor = getattr(module, name)
                if current.shape == value.shape and current.dtype == value.dtype:
                    current.copy_(value)
                else:  # a buffer that each forward pass makes anew, for its batch
                    setattr(module, name, value)
        for module, state in zip(self._stateful, before.states, strict=True):
            module.set_extra_state(state)


def _has_extra_state(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state
