"""What is wrong with an experiment file, in words of the file and not of the library that reads it."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, Union, cast, get_args, get_origin

from pydantic import BaseModel, ValidationError

__all__ = ["DEVICE", "NAME", "InconsistentError", "cut", "lines", "shown"]

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
DEVICE = r"^(auto|cpu|cuda|cuda:\d+)$"
_IN_WORDS: Mapping[str, str] = {
    NAME: "input should be up to 64 letters, digits, `_`, `.` and `-`, the first a letter or a digit",
    DEVICE: "input should be auto, cpu, cuda or cuda:N",
}
_WANTED: Mapping[str, str] = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a section of keys and values",
    "model_type": "a section of keys and values",
}
_UNION_PART = re.compile(r"literal\[.*\]|constrained-\w+")


class InconsistentError(ValueError):
    """What a validator of several fields found: `problems` holds a line for each, with its path within the section."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


def lines(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """Returns a line for each thing wrong: the path as the file has it, the value, and what is allowed.

    Args:
        error: what pydantic found.
        root: the model that the paths begin at.
    """
    errors = cast("list[dict[str, Any]]", error.errors())
    found: list[str] = []
    alternatives: dict[tuple[Any, ...], dict[str, Any]] = {}
    for each in errors:
        *within, last = each["loc"] or ("",)
        if _UNION_PART.fullmatch(str(last)):  # a line for the field, not one for each type that it may have
            kept = alternatives.setdefault(tuple(within), {**each, "loc": tuple(within), "alternatives": []})
            kept["alternatives"].append(each)
            if len(kept["alternatives"]) > 1:
                found[-1] = _line(kept, root)
                continue
            each = kept  # noqa: PLW2901
        if each["type"] == "too_short" and any(_is_inside(other["loc"], each["loc"]) for other in errors):
            continue  # what is in the list is wrong, not how much
        cause = (each.get("ctx") or {}).get("error")
        if isinstance(cause, InconsistentError):
            prefix = "".join(f"{part}." for part in _shown_path(each["loc"]))
            found += [f"{prefix}{problem}" for problem in cause.problems]
        else:
            found.append(_line(each, root))
    return found


def _is_inside(path: tuple[Any, ...], outer: tuple[Any, ...]) -> bool:
    return len(path) > len(outer) and path[: len(outer)] == outer


def _shown_path(location: tuple[Any, ...]) -> list[Any]:
    """Returns a path as the file has it: without the method, which pydantic puts between the section and its key."""
    path = list(location)
    if path[:1] == ["distillation"]:
        del path[1:2]
    return path


def _line(error: dict[str, Any], root: type[BaseModel]) -> str:
    location = _shown_path(error["loc"])
    path = ".".join(str(part) for part in location)
    value = error.get("input")
    kind = error["type"]
    context: dict[str, Any] = error.get("ctx") or {}
    if kind == "extra_forbidden":
        allowed = sorted(_fields_at(root, location[:-1], error["loc"]))
        close = difflib.get_close_matches(str(location[-1]), allowed, 1)
        hint = f"did you mean {close[0]!r}? Allowed" if close else "allowed"
        return f"{path}: unknown key; {hint}: {', '.join(allowed)}"
    if kind == "missing":
        return f"{path}: is needed and not given"
    if kind == "union_tag_invalid":
        return f"{path}.method: {context.get('tag')!r} is not a method; allowed: {_methods(root)}"
    if kind == "union_tag_not_found":
        return f"{path}.method: is needed and not given; allowed: {_methods(root)}"
    if kind == "value_error":
        message = str(error["msg"]).removeprefix("Value error, ")
        return (
            f"{path}: {shown(value)}: {message}"
            if path and not isinstance(value, dict | BaseModel)
            else f"{path}: {message}".removeprefix(": ")
        )
    return f"{path}: {shown(value)} is not allowed: {_reason(error)}"


def _methods(root: type[BaseModel]) -> str:
    """Returns the names of the methods that a section may choose."""
    methods = _models_in(root.model_fields["distillation"].annotation)
    return ", ".join(model.model_fields["method"].default for model in methods)


def _reason(error: dict[str, Any]) -> str:
    """Returns why a value is not allowed, in words of the file and not of the library that reads it."""
    context: dict[str, Any] = error.get("ctx") or {}
    if "alternatives" in error:
        first, *others = map(_reason, error["alternatives"])
        return " or ".join([first, *(other.removeprefix("input should be ") for other in others)])
    match error["type"]:
        case "string_pattern_mismatch":
            return _IN_WORDS.get(context["pattern"], f"it must match {context['pattern']}")
        case "too_short" | "too_long":
            bound = (
                f"at least {context['min_length']}" if "min_length" in context else f"at most {context['max_length']}"
            )
            return f"input should have {bound} item{'' if bound.endswith(' 1') else 's'}"
        case "invalid_key":
            return "keys should be text"
        case kind if kind in _WANTED:
            return f"input should be {_WANTED[kind]}"
        case _:
            text = str(error["msg"])
            return text[:1].lower() + text[1:]


def shown(value: Any) -> str:
    """Returns a value as an error shows it."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return cut(repr(value))


def cut(text: str) -> str:
    """Returns a text that fits into a line with others."""
    return text if len(text) <= 80 else text[:77] + "..."


def _fields_at(root: type[BaseModel], path: list[Any], full: tuple[Any, ...]) -> set[str]:
    """Returns the keys allowed at a path; `full` still holds the union tags that `path` was shown without."""
    candidates: list[type[BaseModel]] = [root]
    for part in path:
        if isinstance(part, int):
            continue
        inner: list[type[BaseModel]] = []
        for model in candidates:
            if part in model.model_fields:
                inner += _models_in(model.model_fields[part].annotation)
        candidates = inner
    tagged = [
        model for model in candidates if "method" in model.model_fields and model.model_fields["method"].default in full
    ]
    return {name for model in tagged or candidates for name in model.model_fields}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, tuple, list, Annotated):
        return [model for inner in get_args(annotation) for model in _models_in(inner)]
    return []
