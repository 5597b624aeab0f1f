"""Loading what an experiment names as `package.module:callable`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sysconfig
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from codistill.process.exit_codes import ExitCode

__all__ = ["LoadError", "accepted", "call", "explained", "is_reference", "load", "some"]

_SHOWN = 8
_NOT_THE_USERS = (
    str(Path(__file__).parent),
    "<frozen",
    *(sysconfig.get_path(each) for each in ("stdlib", "platstdlib", "purelib", "platlib")),
)

_FORM = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")


class LoadError(ValueError):
    """What an experiment names cannot be loaded; the text is one line for people."""

    code = ExitCode.CONFIGURATION


def is_reference(text: str) -> bool:
    """Returns whether a text has the form `package.module:callable`."""
    return _FORM.fullmatch(text) is not None


def load(reference: str, field: str) -> Callable[..., Any]:
    """Imports a callable by its name.

    Args:
        reference: `package.module:callable`; the module is imported as Python finds it, from what is installed and
            from the folders of PYTHONPATH.
        field: the experiment's field that holds the reference, for errors.

    Raises:
        LoadError: the text has another form, there is no such module, the module cannot be imported, has no
            such name, or what it names cannot be called.
    """
    form = _FORM.fullmatch(reference)
    if form is None:
        raise LoadError(f"{field}: {reference!r} is not of the form package.module:callable")
    module_name, name = form.groups()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name != missing and not module_name.startswith(f"{missing}."):
            # The module is there; something that it imports is not.
            raise LoadError(f"{field}: {reference!r}: {explained(error)}") from error
        raise LoadError(
            f"{field}: {reference!r}: there is no module {missing!r}; install it, or add its folder to PYTHONPATH"
        ) from error
    except Exception as error:
        raise LoadError(f"{field}: {reference!r}: {explained(error)}") from error
    found = getattr(module, name, None)
    if callable(found):
        return cast("Callable[..., Any]", found)
    if found is not None:
        raise LoadError(f"{field}: {reference!r} is of type {type(found).__name__}; expected a callable")
    candidates = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
    close = difflib.get_close_matches(name, candidates, 1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise LoadError(
        f"{field}: {reference!r}: module {module_name!r} has no {name!r}; {hint}"
        f"It has: {some(sorted(candidates)) or 'nothing to call'}"
    )


def call(reference: str, field: str, arguments: Mapping[str, Any]) -> Any:
    """Returns what a callable makes of an experiment's arguments.

    Raises:
        LoadError: as :func:`load`, or it does not take an argument, or raised an error of its own.
    """
    function = load(reference, field)
    names = accepted(function)
    for name in arguments:
        if names is not None and name not in names:
            raise LoadError(
                f"distillation.parameters.{name}: {reference!r} has no such argument; accepted: "
                f"{', '.join(sorted(names)) or 'none'}"
            )
    try:
        return function(**arguments)
    except Exception as error:
        raise LoadError(f"{field}: {reference!r}: {explained(error)}") from error


def explained(error: BaseException, ours: tuple[str, ...] = ()) -> str:
    """Returns an error of a user's code as one line: what it is, and at which line of the user's it was raised.

    Args:
        error: the error.
        ours: folders of code that is not the user's, besides this one and Python's own.
    """
    text = " ".join(str(error).split())
    kind = type(error).__name__
    if isinstance(error, SyntaxError):
        return f"{kind}: {text}"  # which names the file and the line already
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((*_NOT_THE_USERS, *ours))] or frames
    place = f" at {own[-1].filename}:{own[-1].lineno}" if own else ""
    return f"{kind}{place}{': ' if text else ''}{text}"


def some(names: Sequence[str]) -> str:
    """Returns names for a message: all of a few, else the first ones and how many more there are."""
    if len(names) <= 2 * _SHOWN:
        return ", ".join(names)
    return f"{', '.join(names[:_SHOWN])} and {len(names) - _SHOWN} more"


def accepted(function: Callable[..., Any]) -> set[str] | None:
    """Returns the names of the keyword arguments that a callable takes, or None if it takes any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a built-in that has no signature to read
        return None
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return None
    return {each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
