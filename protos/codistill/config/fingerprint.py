"""The part of an experiment that must be the same in every process, and how two of them differ.

An identity holds everything that decides a run's numbers, and leaves out fields marked *operational* (a device, a
time-out). It is text: it travels in joins and lies in journals and checkpoints. An identity from outside may be any text.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, TypeAlias, cast

from pydantic import BaseModel

from codistill.config.errors import shorten

__all__ = ["difference", "extends", "identity", "identity_sha256"]

_MISSING = object()
_NOTHING = "nothing"
_NAMED = ("students", "teachers")
_Path: TypeAlias = "tuple[_Path, str] | None"


def identity(experiment: BaseModel) -> str:
    """Return the part of an experiment that must be the same in every process, as canonical JSON."""
    return json.dumps(_decisive_part(experiment), sort_keys=True, separators=(",", ":"), allow_nan=False)


def identity_sha256(experiment: BaseModel) -> bytes:
    """Return the SHA-256 of an experiment's identity, by which two processes tell that theirs are the same."""
    return hashlib.sha256(identity(experiment).encode("ascii")).digest()


def difference(ours: str, theirs: str) -> str | None:
    """Return one line on the first field in which two identities differ, or None if they are equal.

    Args:
        ours: the run's identity.
        theirs: the other identity. It comes from outside, so it may be any text.
    """
    if ours == theirs:
        return None
    our_fields, their_fields = _parse_fields(ours), _parse_fields(theirs)
    if our_fields is None or their_fields is None:
        return "experiment: what was sent is not the JSON of an experiment"
    first = _first_difference(our_fields, their_fields)
    if first is None:
        return "experiment: written differently"
    path, our_value, their_value = first
    section = path.partition(".")[0]
    if section in _NAMED:
        missing = _missing_names(our_fields.get(section), their_fields.get(section))
        if missing is not None:
            return f"experiment {section}: {missing}"
    field = shorten(path if path.isprintable() else ascii(path))
    return f"experiment field {field}: the run has {shorten(our_value)}, this worker has {shorten(their_value)}"


def extends(older: str, newer: str) -> bool:
    """Return whether `newer` is `older` with students appended, and nothing else changed."""
    try:
        before, after = json.loads(older), json.loads(newer)
        students, more = before.pop("students"), after.pop("students")
        return bool(before == after and len(more) > len(students) and more[: len(students)] == students)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _decisive_part(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return {
            name: _decisive_part(getattr(value, name))
            for name, field in type(value).model_fields.items()
            if not (isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("operational"))
        }
    if isinstance(value, tuple | list):
        return [_decisive_part(item) for item in cast("list[Any]", value)]
    if isinstance(value, dict):
        return {str(key): _decisive_part(item) for key, item in cast("dict[Any, Any]", value).items()}
    return value


def _parse_fields(text: str) -> dict[str, Any] | None:
    """Return the fields of an identity, or None where it is not a JSON object with any."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) and fields else None


def _first_difference(ours: Any, theirs: Any) -> tuple[str, str, str] | None:
    """Return the path of the first field that differs and both values as JSON, or None.

    Only the returned path is written out. With long keys in a document from outside, all paths together would take the
    square of its size. The search does not recurse, as such a document may be nested as deep as JSON is read.
    """
    pending: list[tuple[_Path, Any, Any]] = [(None, ours, theirs)]
    while pending:
        path, our_value, their_value = pending.pop()
        our_items, their_items = _items(our_value), _items(their_value)
        if (our_items or our_value is _MISSING) and (their_items or their_value is _MISSING):
            keys = sorted({*our_items, *their_items}, reverse=True)
            pending += [((path, key), our_items.get(key, _MISSING), their_items.get(key, _MISSING)) for key in keys]
            continue
        our_text = _NOTHING if our_items or our_value is _MISSING else json.dumps(our_value)
        their_text = _NOTHING if their_items or their_value is _MISSING else json.dumps(their_value)
        if our_text != their_text and not _equal_numbers(our_value, their_value):
            return _dotted(path), our_text, their_text
    return None


def _equal_numbers(ours: Any, theirs: Any) -> bool:
    """Return whether two values are one number, which another language may write in another way."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (ours, theirs))
    return numbers and ours == theirs


def _missing_names(ours: Any, theirs: Any) -> str | None:
    """Return a text on the named items that only one of two lists has, or None if each has some that the other lacks.

    A comparison by position would name the first field of the item after a missing one.
    """
    our_names, their_names = _names(ours), _names(theirs)
    if our_names > their_names:
        return f"the run has {_listed(our_names - their_names)}, this worker has not"
    if their_names > our_names:
        return f"this worker has {_listed(their_names - our_names)}, the run has not"
    return None


def _listed(names: set[str]) -> str:
    return shorten(json.dumps(sorted(names))[1:-1])


def _names(value: Any) -> set[str]:
    names = (item.get("name") for item in _items(value).values() if isinstance(item, dict))
    return {name for name in names if isinstance(name, str)}


def _items(value: Any) -> dict[str, Any]:
    """Return the values in a map, or in a list by their positions; nothing for any other value."""
    if isinstance(value, dict):
        return cast("dict[str, Any]", value)
    if isinstance(value, list):
        return {str(index): item for index, item in enumerate(cast("list[Any]", value))}
    return {}


def _dotted(path: _Path) -> str:
    keys: list[str] = []
    while path is not None:
        path, key = path
        keys.append(key)
    return ".".join(reversed(keys))
