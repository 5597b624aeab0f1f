"""The state of modules that no checkpoint holds: buffers that are not persistent, and plain attributes.

Only what can be compared is looked at: tensors, arrays, generators of random numbers, numbers, texts, and containers of
them. Objects of other classes are passed over.
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Iterator, Mapping, Set
from typing import Any, cast

import numpy as np
import torch
from torch import nn

__all__ = ["digest", "unsaved_state"]

_TORCHS = frozenset(vars(nn.Module()))
_DEEPEST = 8


def unsaved_state(
    saved: Mapping[str, nn.Module], beside: Mapping[str, nn.Module], others: Mapping[str, object]
) -> dict[str, str]:
    """Return a digest of each piece of state that no checkpoint holds.

    Args:
        saved: modules whose `state_dict` a checkpoint holds, by the prefix of their names.
        beside: modules that no checkpoint holds, likewise; those that are in `saved` too are left out.
        others: objects whose attributes count, likewise.

    Returns:
        Digests by the name for people: "buffer 'body.running'", "attribute 'body.steps'".
    """
    found: dict[str, str] = {}
    seen: set[nn.Module] = set()
    for roots, is_saved in ((saved, True), (beside, False)):
        for prefix, root in roots.items():
            for path, module in root.named_modules(seen, prefix):
                dot = f"{path}." if path else ""
                transient: Set[str] = cast("Any", module)._non_persistent_buffers_set  # noqa: SLF001 - it has no other name
                for name, value in module.named_buffers(recurse=False):
                    if name in transient or not is_saved:
                        found[f"buffer {dot + name!r}"] = digest(value)
                for name, value in vars(module).items():
                    if name not in _TORCHS:
                        found[f"attribute {dot + name!r}"] = digest(value)
    for prefix, value in others.items():
        for name, attribute in vars(value).items():
            found[f"attribute '{prefix}.{name}'"] = digest(attribute)
    return found


def digest(value: object) -> str:
    """Return a SHA-256 of a value, in hexadecimal; equal for values that cannot be compared."""
    hashed = hashlib.sha256()
    for piece in _pieces(value, 0):
        hashed.update(len(piece).to_bytes(8, "little"))
        hashed.update(piece)
    return hashed.hexdigest()


def _pieces(value: Any, depth: int) -> Iterator[bytes | memoryview]:
    """Yield a value's content, in an order that follows from the value."""
    yield type(value).__name__.encode()
    if depth > _DEEPEST:
        return
    if isinstance(value, torch.Tensor):
        if value.layout is torch.strided and value.device.type != "meta" and not value.is_quantized:
            yield f"{value.dtype} {list(value.shape)}".encode()
            copied = value.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
            yield copied.reshape(-1).view(torch.uint8).numpy().data
    elif isinstance(value, np.ndarray):
        array = cast("np.ndarray[Any, Any]", value)
        yield f"{array.dtype} {array.shape}".encode()
        yield from _pieces(array.tolist(), depth + 1) if array.dtype.hasobject else [array.tobytes()]
    elif isinstance(value, torch.Generator):
        yield from _pieces(value.get_state(), depth + 1)
    elif isinstance(value, np.random.Generator):
        yield from _pieces(value.bit_generator.state, depth + 1)
    elif isinstance(value, np.random.RandomState):
        yield from _pieces(value.get_state(legacy=False), depth + 1)
    elif isinstance(value, random.Random):
        yield repr(value.getstate()).encode()
    elif isinstance(value, bool | int | float | complex | str | bytes | np.generic):
        yield repr(value).encode()
    elif isinstance(value, Mapping):
        for key, item in cast("Mapping[Any, Any]", value).items():
            yield from _pieces(key, depth + 1)
            yield from _pieces(item, depth + 1)
    elif isinstance(value, list | tuple | deque):
        items = cast("list[Any]", value)
        yield str(len(items)).encode()
        for item in items:
            yield from _pieces(item, depth + 1)
    elif isinstance(value, Set):
        yield from sorted(digest(item).encode() for item in cast("Set[Any]", value))
