"""Puts back what a forward pass changes of a student: buffers, such as batch statistics, and extra states."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

__all__ = ["Rollback"]

# torch's optimisers use it, and it has no public name.
_copy_all = torch._foreach_copy_  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


class Rollback:
    """Copies what a forward pass changes of modules, and puts it back.

    The copies stay and are written again at the next step, in one call for all buffers of a kind. New copies would cost an
    allocation and a kernel for each of them, at every step.

    Args:
        root: holds the modules.
    """

    def __init__(self, root: nn.Module) -> None:
        # By owner and name, as a module may put a new tensor in the place of its buffer.
        self._buffers = [(module, name) for module in root.modules() for name, _ in module.named_buffers(recurse=False)]
        self._stateful = [module for module in root.modules() if _has_extra_state(module)]
        self._copies: list[torch.Tensor] = []
        self._kinds: list[list[int]] = []  # positions among the buffers, those of one device and dtype together
        self._states: list[Any] = []

    def keep(self) -> None:
        """Copy the present values, in place of those that were kept before."""
        buffers: list[torch.Tensor] = [getattr(module, name) for module, name in self._buffers]
        with torch.no_grad():
            if len(self._copies) == len(buffers) and all(map(_alike, self._copies, buffers)):
                for kind in self._kinds:
                    _copy_all([self._copies[at] for at in kind], [buffers[at] for at in kind])
            else:
                self._copies = [buffer.detach().clone() for buffer in buffers]
                kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
                for at, buffer in enumerate(buffers):
                    kinds.setdefault((buffer.device, buffer.dtype), []).append(at)
                self._kinds = list(kinds.values())
        self._states = [copy.deepcopy(module.get_extra_state()) for module in self._stateful]

    def restore(self) -> None:
        """Put the values back that were kept last."""
        with torch.no_grad():
            for (module, name), value in zip(self._buffers, self._copies, strict=True):
                current: torch.Tensor = getattr(module, name)
                if _alike(value, current):
                    current.copy_(value)
                else:  # a buffer that each forward pass makes anew, for its batch
                    setattr(module, name, value.clone())
        for module, state in zip(self._stateful, self._states, strict=True):
            module.set_extra_state(copy.deepcopy(state))


def _alike(kept: torch.Tensor, buffer: torch.Tensor) -> bool:
    return kept.shape == buffer.shape and kept.dtype == buffer.dtype and kept.device == buffer.device


def _has_extra_state(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state
