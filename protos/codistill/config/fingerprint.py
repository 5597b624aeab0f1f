"""What of an experiment must be the same everywhere, and how two of them differ.

Everything that decides a run's numbers is in its identity; fields marked *operational* (a device, a time-out) are left out.
An identity is text, as it travels in joins and lies in journals and checkpoints; one from outside may be any text.
"""

from __future__ import annotations

import json
from typing import Any, TypeAlias, cast

from pydantic import BaseModel

from codistill.config.errors import cut

__all__ = ["difference", "extends", "identity"]

_MISSING = object()
_NOTHING = "nothing"
_NAMED = ("students", "teachers")
_Path: TypeAlias = "tuple[_Path, str] | None"


def identity(experiment: BaseModel) -> str:
    """Returns what of an experiment must be the same everywhere, as canonical JSON."""
    return json.dumps(_identity_of(experiment), sort_keys=True, separators=(",", ":"), allow_nan=False)


def difference(ours: str, theirs: str) -> str | None:
    """Returns one line on the first field in which two identities differ, or None if they are equal.

    Args:
        ours: the run's identity.
        theirs: the other one's; it may be any text, as it comes from outside.
    """
    if ours == theirs:
        return None
    left, right = _document_in(ours), _document_in(theirs)
    if left is None or right is None:
        return "experiment: what was sent is not the JSON of an experiment"
    differs = _first_difference(left, right)
    if differs is not None:
        path, have, has = differs
        section = path.partition(".")[0]
        extra = _those_that_one_lacks(left.get(section), right.get(section)) if section in _NAMED else None
        if extra is not None:
            return f"experiment {section}: {extra}"
        shown = cut(path if path.isprintable() else ascii(path))
        return f"experiment field {shown}: the run has {cut(have)}, this worker has {cut(has)}"
    return "experiment: written differently"


def extends(older: str, newer: str) -> bool:
    """Returns whether an identity is another one's with students added after the others, and nothing else changed.

    Args:
        older: the identity without them.
        newer: the identity that may have more students.
    """
    try:
        before, after = json.loads(older), json.loads(newer)
        had, has = before.pop("students"), after.pop("students")
        return bool(before == after and len(has) > len(had) and has[: len(had)] == had)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _identity_of(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return {
            name: _identity_of(getattr(value, name))
            for name, field in type(value).model_fields.items()
            if not (isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("operational"))
        }
    if isinstance(value, tuple | list):
        return [_identity_of(item) for item in cast("list[Any]", value)]
    if isinstance(value, dict):
        return {str(key): _identity_of(item) for key, item in cast("dict[Any, Any]", value).items()}
    return value


def _document_in(text: str) -> dict[str, Any] | None:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) and document else None


def _first_difference(ours: Any, theirs: Any) -> tuple[str, str, str] | None:
    """Returns the path of the first field that differs and both values as JSON, or None.

    Only the path that is returned is ever written out: of a document from outside with long keys, all paths together
    would take the square of its size. Nor does it recurse, as such a document may be nested as deep as JSON is read.
    """
    pending: list[tuple[_Path, Any, Any]] = [(None, ours, theirs)]
    while pending:
        path, left, right = pending.pop()
        inner, other = _items(left), _items(right)
        if (inner or left is _MISSING) and (other or right is _MISSING):
            keys = sorted({*inner, *other}, reverse=True)
            pending += [((path, key), inner.get(key, _MISSING), other.get(key, _MISSING)) for key in keys]
            continue
        have = _NOTHING if inner or left is _MISSING else json.dumps(left)
        has = _NOTHING if other or right is _MISSING else json.dumps(right)
        if have != has:
            return _written(path), have, has
    return None


def _those_that_one_lacks(ours: Any, theirs: Any) -> str | None:
    """Returns in words which named items only one of two lists has, or None where neither is the other with more.

    Items go by their places elsewhere: where one is missing, the next one's first field would be named.
    """
    have, has = _names(ours), _names(theirs)
    if have > has:
        return f"the run has {cut(json.dumps(sorted(have - has))[1:-1])}, this worker has not"
    if has > have:
        return f"this worker has {cut(json.dumps(sorted(has - have))[1:-1])}, the run has not"
    return None


def _names(value: Any) -> set[str]:
    names = (item.get("name") for item in _items(value).values() if isinstance(item, dict))
    return {name for name in names if isinstance(name, str)}


def _items(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return cast("dict[str, Any]", value)
    if isinstance(value, list):
        return {str(index): item for index, item in enumerate(cast("list[Any]", value))}
    return {}


def _written(path: _Path) -> str:
    keys: list[str] = []
    while path is not None:
        path, key = path
        keys.append(key)
    return ".".join(reversed(keys))
