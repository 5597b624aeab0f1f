"""The state of modules and methods that nothing saves: buffers that are not persistent, attributes, what their code names.

Objects of any class are searched: their attributes, what functions enclose, and the globals that a user's classes and
functions name. The search is bounded in depth and size. Objects of compiled code show nothing, and are passed over.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from types import BuiltinMethodType, CodeType, FunctionType, GeneratorType, MappingProxyType, MethodType, ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from codistill.process import plugins

__all__ = ["Unsaved", "digest", "unsaved_state"]

_TORCHS = frozenset(vars(nn.Module()))
_HOOKS = tuple(name for name in sorted(_TORCHS) if name.endswith("hooks"))
_DEEPEST = 8
_MOST = 200_000
_PLAIN = (bool, int, float, complex, str, bytes, np.generic, type(None))
_CONTAINERS = (dict, MappingProxyType, list, tuple, deque, set, frozenset)
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator, torch.Generator)
_ITERATORS = (
    *(type(iter(made)) for made in ([], (), {}, set(), "", b"", range(0), deque())),
    *(type(made) for made in (reversed([]), enumerate(()), zip(), map(str, ()), filter(None, ()))),
    *(member for member in vars(itertools).values() if isinstance(member, type)),
)
_PASSED_OVER = ("asyncio", "concurrent", "logging", "multiprocessing", "threading", "torch._", "weakref")
"""Modules whose objects hold a process's own state: locks, handlers, compilers."""


@dataclass
class Unsaved:
    """Digests of the state that no checkpoint holds, by its name for people: "buffer 'body.running'", "global 'own.K'".

    Attributes:
        held: of tensors, arrays and iterators.
        plain: of numbers and texts.
        generators: the type of each generator of random numbers that no step seeds.
    """

    held: dict[str, str] = field(default_factory=dict[str, str])
    plain: dict[str, str] = field(default_factory=dict[str, str])
    generators: dict[str, str] = field(default_factory=dict[str, str])


def unsaved_state(
    saved: Mapping[str, nn.Module], beside: Mapping[str, nn.Module], others: Mapping[str, object]
) -> Unsaved:
    """Return a digest of each piece of state that no checkpoint holds.

    Args:
        saved: modules whose `state_dict` a checkpoint holds, by the prefix of their names.
        beside: modules that no checkpoint holds, likewise; those that are in `saved` too are left out.
        others: objects whose attributes count, likewise.
    """
    modules: list[tuple[str, nn.Module, bool]] = []
    reached: set[nn.Module] = set()
    for roots, is_saved in ((saved, True), (beside, False)):
        for prefix, root in roots.items():
            modules += [(path, module, is_saved) for path, module in root.named_modules(reached, prefix)]
    in_checkpoints = [value for root in saved.values() for value in root.state_dict(keep_vars=True).values()]
    search = _Search([module for _, module, _ in modules] + in_checkpoints + list(others.values()))
    for path, module, is_saved in modules:
        dot = f"{path}." if path else ""
        transient: Set[str] = cast("Any", module)._non_persistent_buffers_set  # noqa: SLF001 - it has no other name
        for name, value in module.named_buffers(recurse=False):
            if name in transient or not is_saved:
                search.add("buffer", dot + name, value)
        for name in _HOOKS:
            hooks: Any = vars(module).get(name)
            search.add("hook of", path or type(module).__name__, list(hooks.values()) if hooks else None)
        for name, value in vars(module).items():
            if name not in _TORCHS:
                search.add("attribute", dot + name, value)
        search.code.append(type(module))
    for prefix, value in others.items():
        for name, attribute in getattr(value, "__dict__", {}).items():
            search.add("attribute", f"{prefix}.{name}", attribute)
        search.code.append(type(value))
    search.add_code()
    return search.found


def digest(value: object) -> str:
    """Return a SHA-256 of a value, in hexadecimal; equal for values that cannot be compared."""
    search = _Search([])
    search.add("", "", value)
    return "".join((*search.found.held.values(), *search.found.plain.values()))


class _Search:
    """Digests what is reached from named roots; each object counts once, where it is reached first.

    Args:
        known: objects that are searched by themselves, and passed over elsewhere.

    Attributes:
        found: the digests.
        code: the user's classes and functions that were reached, to search by :meth:`add_code`.
    """

    def __init__(self, known: Sequence[object]) -> None:
        self.found = Unsaved()
        self.code: list[Any] = []
        self._seen: dict[int, object] = {id(each): each for each in (*known, *_seeded_generators())}
        self._left = _MOST
        self._held = self._plain = hashlib.sha256()
        self._kind = ""

    def add(self, kind: str, name: str, value: object) -> None:
        """Digest a root; `kind` and `name` make its name for people."""
        self._kind, self._held, self._plain = kind, hashlib.sha256(), hashlib.sha256()
        self._visit(value, name, 0)
        for digests, hashed in ((self.found.held, self._held), (self.found.plain, self._plain)):
            key = f"{kind} {name!r}"
            digests[key] = digests.get(key, "") + hashed.hexdigest()

    def add_code(self) -> None:
        """Digest what the reached code of the user names: attributes of classes, and globals."""
        done: set[int] = set()
        while self.code:
            code = self.code.pop()
            if id(code) in done:
                continue
            done.add(id(code))
            if isinstance(code, type):
                self._add_class(code)
            else:
                function = cast("FunctionType", code)
                for name in sorted(_names(function.__code__)):
                    if name in function.__globals__:
                        self.add("global", f"{function.__module__}.{name}", function.__globals__[name])

    def _add_class(self, searched: type) -> None:
        for base in searched.__mro__:
            if not _is_users(base):
                continue
            for name, member in list(vars(base).items()):
                if isinstance(member, property):
                    self.code += [each for each in (member.fget, member.fset) if _is_users(each)]
                elif not (name.startswith("__") and name.endswith("__")) or callable(member):
                    self.add("class attribute", f"{base.__qualname__}.{name}", member)

    def _visit(self, value: Any, path: str, depth: int) -> None:
        self._left -= 1
        kind = type(value)
        if isinstance(value, _PLAIN):
            self._put(self._plain, kind.__name__.encode(), repr(value).encode())
            return
        if depth > _DEEPEST or self._left < 0 or isinstance(value, ModuleType):
            return
        if id(value) in self._seen:
            return
        if not isinstance(value, torch.Tensor | np.ndarray | tuple):  # which hold no reference to themselves
            self._seen[id(value)] = value  # keeps it, so that no other object gets its id
        if isinstance(value, torch.Tensor | np.ndarray):
            self._visit_array(value, path, depth)
        elif isinstance(value, _GENERATORS):
            self.found.generators[f"{self._kind} {path!r}"] = f"{kind.__module__}.{kind.__qualname__}"
        elif isinstance(value, _CONTAINERS):
            self._visit_container(value, path, depth)
        elif isinstance(value, type | FunctionType):
            self._visit_code(value, path, depth)
        elif isinstance(value, MethodType | functools.partial | BuiltinMethodType | staticmethod | classmethod):
            for name in ("__self__", "__func__", "func", "args", "keywords"):
                self._visit(getattr(cast("Any", value), name, None), path, depth + 1)
        elif isinstance(value, GeneratorType):
            frame = value.gi_frame
            self._put(self._held, repr(frame and frame.f_lasti).encode())
            self._visit_held(frame and frame.f_locals, path, depth)
        elif isinstance(value, _ITERATORS):
            self._visit_held(value.__reduce__(), path, depth)
        elif not f"{kind.__module__}.".startswith(tuple(_PASSED_OVER)):
            self._visit_object(value, path, depth)

    def _visit_held(self, value: Any, path: str, depth: int) -> None:
        """Digest the position of an iterator, whose numbers are not plain: to move is all that it is for."""
        plain, self._plain = self._plain, self._held
        self._visit(value, path, depth + 1)
        self._plain = plain

    def _visit_array(self, value: Any, path: str, depth: int) -> None:
        if isinstance(value, np.ndarray):
            array = cast("np.ndarray[Any, Any]", value)
            self._put(self._held, f"{array.dtype} {array.shape}".encode())
            if array.dtype.hasobject:
                self._visit(array.tolist(), path, depth + 1)
            else:
                self._put(self._held, array.tobytes())
        elif value.layout is torch.strided and value.device.type != "meta" and not value.is_quantized:
            if is_lazy(value):
                return
            copied = value.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
            self._put(self._held, f"{value.dtype} {list(value.shape)}".encode())
            self._put(self._held, copied.reshape(-1).view(torch.uint8).numpy().data)

    def _visit_container(self, value: Any, path: str, depth: int) -> None:
        self._put(self._plain, str(len(value)).encode())
        if isinstance(value, dict | MappingProxyType):
            for key, item in list(cast("dict[Any, Any]", value).items()):
                self._visit(key, path, depth + 1)
                self._visit(item, f"{path}[{key!r}]" if isinstance(key, str | int) else path, depth + 1)
        elif isinstance(value, set | frozenset):
            for one in sorted(digest(item) for item in cast("set[Any]", value)):
                self._put(self._plain, one.encode())
        else:
            for position, item in enumerate(list(cast("list[Any]", value))):
                self._visit(item, f"{path}[{position}]", depth + 1)
        self._visit_attributes(value, path, depth)

    def _visit_code(self, value: Any, path: str, depth: int) -> None:
        if not _is_users(value):
            return
        self.code.append(value)
        if isinstance(value, type):
            return
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                enclosed = cell.cell_contents
            except ValueError:  # it is not bound yet
                continue
            self._visit(enclosed, f"{path}.{name}", depth + 1)
        self._visit((value.__defaults__, value.__kwdefaults__, vars(value)), path, depth + 1)

    def _visit_object(self, value: Any, path: str, depth: int) -> None:
        if _is_users(type(value)):
            self.code.append(type(value))
        self._visit_attributes(value, path, depth)
        for base in type(value).__mro__:
            slots: Any = vars(base).get("__slots__", ())
            for slot in (slots,) if isinstance(slots, str) else slots:
                member: Any = vars(base).get(slot, vars(base).get(f"_{base.__name__.lstrip('_')}{slot}"))
                try:
                    attribute = member.__get__(value) if member is not None else None
                except AttributeError:  # it has no value yet
                    continue
                self._visit(attribute, f"{path}.{slot}", depth + 1)

    def _visit_attributes(self, value: Any, path: str, depth: int) -> None:
        try:
            attributes = cast("dict[str, Any]", object.__getattribute__(value, "__dict__"))
        except AttributeError:
            return
        hidden = isinstance(value, nn.Module)
        for name, attribute in list(attributes.items()):
            if not (hidden and name in _TORCHS) or name in ("_parameters", "_buffers", "_modules"):
                named = path if hidden and name in _TORCHS else f"{path}.{name}"
                self._visit(attribute, named, depth if hidden else depth + 1)

    def _put(self, hashed: Any, *pieces: bytes | memoryview) -> None:
        for piece in pieces:
            hashed.update(len(piece).to_bytes(8, "little"))
            hashed.update(piece)


def _seeded_generators() -> Iterator[object]:
    """Yield the generators that every step seeds."""
    yield cast("Any", random.random).__self__
    yield cast("Any", np.random.rand).__self__
    yield cast("Any", np.random.rand).__self__._bit_generator  # noqa: SLF001 - it has no other name
    yield torch.default_generator
    if torch.cuda.is_initialized():
        yield from torch.cuda.default_generators


def _is_users(code: Any) -> bool:
    """Return whether a class or a function is of a user's own module."""
    name = str(getattr(code, "__module__", ""))
    if isinstance(code, FunctionType):
        return plugins.is_users(name, code.__code__.co_filename)
    file = getattr(sys.modules.get(name), "__file__", None)
    return file is not None and plugins.is_users(name, file)


def _names(code: CodeType) -> set[str]:
    """Return the names of globals and attributes in a function, and in the functions within it."""
    within = [_names(each) for each in code.co_consts if isinstance(each, CodeType)]
    return set(code.co_names).union(*within)
