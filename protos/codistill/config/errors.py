"""Lines on what is wrong with an experiment file, in the file's terms and not in those of pydantic."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Union, cast, get_args, get_origin

from pydantic import BaseModel, ValidationError

from codistill.config.strict_yaml import Document, Word

__all__ = [
    "DEVICE_PATTERN",
    "NAME_PATTERN",
    "NOT_EMPTY",
    "PRETRAINED",
    "PRETRAINED_KEYS",
    "SectionError",
    "format_value",
    "problem_lines",
    "shorten",
    "word_lines",
]

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
DEVICE_PATTERN = r"^(auto|cpu|cuda|cuda:\d+)$"
NOT_EMPTY = r"\S"
"""The pattern of text that may be anything but nothing."""
PRETRAINED_KEYS = frozenset(
    {"checkpoint", "checkpoint_path", "init_from", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "weights"}
)
"""Keys by which libraries and training loops let a model begin from weights."""

PRETRAINED = (
    "models are built untrained; to begin from weights, let the student's `model` be a callable of your own that loads them, "
    'for example "mine:net" of mine.py beside the experiment (the README shows one)'
)
_PATTERN_REASONS: Mapping[str, str] = {
    NAME_PATTERN: "input should be up to 64 letters, digits, `_`, `.` and `-`, the first a letter or a digit",
    DEVICE_PATTERN: "input should be auto, cpu, cuda or cuda:N",
    NOT_EMPTY: "input should not be empty",
}
_TYPE_NAMES: Mapping[str, str] = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a section of keys and values",
    "model_type": "a section of keys and values",
    "model_attributes_type": "a section of keys and values",
}
_WORDS = ("no", "on", "off", "yes", "null", "~", "0x1F", "1_000", "12:30", "1e3")
_OWN_WORDS = frozenset({"literal_error", "string_type", "union_tag_invalid"})
"""Errors of fields of text, whose line says how a word that is no text was read."""

_UNTYPED = frozenset({"model_args", "parameters"})
"""Keys below which anything may stand, so that no type shows whether `no` is meant as text."""

_UNION_MEMBER = re.compile(r"literal\[.*\]|constrained-\w+")


class SectionError(ValueError):
    """Fields of a section that do not fit each other.

    Attributes:
        problems: a line for each, with its path within the section.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


def problem_lines(error: ValidationError, root: type[BaseModel], read: Document | None = None) -> list[str]:
    """Return a line for each problem: its path in the file, the value, and what is allowed.

    Args:
        error: pydantic's error.
        root: the model that the paths begin at.
        read: the document, if a file was read.
    """
    read = read or Document(None)
    doubtful = {path for path, word in read.words.items() if word.advice is not None}
    errors = cast("list[dict[str, Any]]", error.errors())
    lines: list[str] = []
    fields: dict[tuple[Any, ...], dict[str, Any]] = {}
    for found in errors:
        problem = found
        *parents, last = problem["loc"] or ("",)
        if _UNION_MEMBER.fullmatch(
            str(last)
        ):  # pydantic has an error for each type of a union; the field gets one line
            path = tuple(parents)
            problem = fields.setdefault(path, {**problem, "loc": path, "alternatives": []})
            problem["alternatives"].append(found)
            if len(problem["alternatives"]) > 1:
                lines[-1] = _problem_line(problem, root, read)
                continue
        if read.keys and (problem["type"] == "invalid_key" or problem["loc"][-1:] == ("[key]",)):
            continue  # a key that is no text has its own line, as have those that no field checks
        if problem["type"] == "too_short" and any(_is_inside(other["loc"], problem["loc"]) for other in errors):
            continue  # the list is too short only because pydantic dropped the items that are wrong
        cause = (problem.get("ctx") or {}).get("error")
        place = tuple(map(str, _path_in_file(problem["loc"])))
        if place in doubtful and problem["type"] not in _OWN_WORDS:
            continue  # it has its own line, as a range says nothing of a number that may not be meant
        if doubtful and problem["type"] == "value_error" and isinstance(problem["input"], dict | BaseModel):
            continue  # fields are compared once it is known what each of them means
        if isinstance(cause, SectionError):
            prefix = "".join(f"{part}." for part in place)
            lines += [_as_written(f"{prefix}{line}", read) for line in cause.problems]
        else:
            lines.append(_problem_line(problem, root, read))
    return lines


def _is_inside(path: tuple[Any, ...], outer: tuple[Any, ...]) -> bool:
    return len(path) > len(outer) and path[: len(outer)] == outer


def _path_in_file(location: tuple[Any, ...]) -> list[Any]:
    """Return a path without the method, which pydantic puts between `distillation` and its key."""
    path = list(location)
    if path[:1] == ["distillation"]:
        del path[1:2]
    return path


def _problem_line(error: dict[str, Any], root: type[BaseModel], read: Document) -> str:
    location = _path_in_file(error["loc"])
    path = ".".join(str(part) for part in location)
    value = error.get("input")
    kind = error["type"]
    if kind == "extra_forbidden":
        allowed = sorted(_keys_at(root, location[:-1], error["loc"]))
        close = difflib.get_close_matches(str(location[-1]), allowed, 1)
        hint = f"did you mean {close[0]!r}? Allowed" if close else "allowed"
        if location[0] == "students" and location[-1] in PRETRAINED_KEYS:
            hint = f"{PRETRAINED}; allowed"
        return f"{path}: unknown key; {hint}: {', '.join(allowed)}"
    if kind == "missing":
        return f"{path}: is needed and not given"
    if kind == "union_tag_invalid":
        return _method_line(cast("dict[Any, Any]", value)["method"], path, read, _method_names(root))
    if kind == "union_tag_not_found":
        return f"{path}.method: is needed and not given; allowed: {_method_names(root)}"
    if kind == "value_error":
        message = str(error["msg"]).removeprefix("Value error, ")
        return (
            f"{path}: {format_value(value)}: {message}"
            if path and not isinstance(value, dict | BaseModel)
            else f"{path}: {message}".removeprefix(": ")
        )
    word_line = _word_line(location, kind, read)
    if word_line is not None:
        return word_line
    return f"{path}: {_format_in_file(location, value, read)} is not allowed: {_reason(error)}"


def _method_line(value: Any, path: str, read: Document, names: str) -> str:
    """Return the line for a value that names no method."""
    word = read.words.get((*path.split("."), "method"))
    if word is None or not word.text:
        shown = "no value" if value is None else format_value(value)
        return f"{path}.method: {shown} is not a method; allowed: {names}"
    text = shorten(word.text)
    return f'{path}.method: YAML reads `{text}` as {word.meaning}; write "{text}" in quotes if it is text; allowed: {names}'


def _word_line(location: list[Any], kind: str, read: Document) -> str | None:
    """Return the line for a word that YAML does not read as text where text is needed; None for all else."""
    parts = tuple(map(str, location))
    word = read.words.get(parts) if kind == "string_type" else None
    return _quoting(".".join(parts), "", word) if word is not None and word.text else None


def _quoting(path: str, what: str, word: Word) -> str:
    """Return the line that says to put a word in quotes; `what` is "the key " where it is one."""
    text = shorten(word.text)
    others = ", ".join(other for other in _WORDS if other != text)
    return f'{path}: YAML reads {what}`{text}` as {word.meaning}; write "{text}" in quotes (as well: {others})'


def _as_written(line: str, read: Document) -> str:
    """Return a line on fields that do not fit each other, with its value as the file has it where that differs."""
    path, _, rest = line.partition(": ")
    word = read.words.get(tuple(path.split(".")))
    if word is None or word.is_plain or not (shown := re.match(r"[-+\w.]*\w", rest)):
        return line
    try:
        same = float(shown[0]) == word.value
    except ValueError:
        return line
    return (
        f"{path}: `{shorten(word.text)}`, which YAML reads as {word.meaning}, {rest[shown.end() :].lstrip(', ')}"
        if same
        else line
    )


def _format_in_file(location: list[Any], value: Any, read: Document) -> str:
    """Return a value's short form, and what stands in the file where YAML made another thing of it."""
    word = read.words.get(tuple(map(str, location)))
    if word is None or word.is_plain:
        return format_value(value)
    return f"`{shorten(word.text)}`, which YAML reads as {word.meaning}," if word.text else "no value"


def word_lines(read: Document, lines: Sequence[str]) -> list[str]:
    """Return a line for each word that means another than it seems to: keys that are no text, 031 and 12:30.

    Where no type shows what is meant, as in `model_args`, `no` and its like are among them.

    Args:
        read: the document.
        lines: what else is wrong; a field that is named there gets no second line.
    """
    found = [
        _quoting(".".join([*parts[:-1], shorten(word.text)]), "the key ", word) for parts, word in read.keys.items()
    ]
    for parts, word in read.words.items():
        path = ".".join(parts)
        untyped = isinstance(word.value, bool) and not word.is_plain and not _UNTYPED.isdisjoint(parts[:-1])
        advice = word.meaning if untyped else word.advice
        if advice is not None and not any(line.startswith(f"{path}: ") for line in lines):
            text = shorten(word.text)
            found.append(
                f'{path}: YAML reads `{text}` as {word.meaning}; write {advice}, or "{text}" in quotes if it is text'
            )
    return found


def _method_names(root: type[BaseModel]) -> str:
    """Return the names of the methods that `distillation.method` may choose."""
    methods = _models_in(root.model_fields["distillation"].annotation)
    return ", ".join(model.model_fields["method"].default for model in methods)


def _reason(error: dict[str, Any]) -> str:
    """Return the reason why a value is not allowed."""
    context: dict[str, Any] = error.get("ctx") or {}
    if "alternatives" in error:
        first, *others = map(_reason, error["alternatives"])
        return " or ".join([first, *(other.removeprefix("input should be ") for other in others)])
    match error["type"]:
        case "string_pattern_mismatch":
            return _PATTERN_REASONS.get(context["pattern"], f"it must match {context['pattern']}")
        case "too_short" | "too_long":
            bound = (
                f"at least {context['min_length']}" if "min_length" in context else f"at most {context['max_length']}"
            )
            return f"input should have {bound} item{'' if bound.endswith(' 1') else 's'}"
        case "invalid_key":
            return "keys should be text"
        case kind if kind in _TYPE_NAMES:
            return f"input should be {_TYPE_NAMES[kind]}"
        case _:
            text = str(error["msg"])
            return text[:1].lower() + text[1:]


def format_value(value: Any) -> str:
    """Return a value's short form for an error line."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return shorten(repr(value))


def shorten(text: str) -> str:
    """Return a text, cut to at most 80 characters."""
    return text if len(text) <= 80 else text[:77] + "..."


def _keys_at(root: type[BaseModel], path: list[Any], full: tuple[Any, ...]) -> set[str]:
    """Return the keys allowed at a path.

    Args:
        root: the model that the path begins at.
        path: the path as in the file.
        full: pydantic's path, with the method's name in it.
    """
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
    """Return the models among the members of an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, tuple, list, Annotated):
        return [model for inner in get_args(annotation) for model in _models_in(inner)]
    return []
