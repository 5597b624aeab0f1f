"""Loads the callables that an experiment names as `package.module:callable`."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import re
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, cast

from codistill.process import modules_beside
from codistill.process.exit_codes import ExitCode
from codistill.process.interrupts import is_interrupt
from codistill.process.torchvision_operators import declare_missing_operators

__all__ = [
    "LoadError",
    "accepted_arguments",
    "call",
    "code_place",
    "command_arguments",
    "explain_error",
    "is_reference",
    "is_users",
    "load",
    "raised_by_user",
    "shorten",
    "users_code",
]

_SHOWN = 8
_OURS = frozenset({"codistill", "codistill_deploy", "codistill_server", "codistill_worker"})
_NOT_THE_USERS = (
    "<",  # made while it runs, without a file
    *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
)

_NO_PLUGINS = frozenset({"torch"})  # every error of a model would be of its own code
_packages: set[str] = set()
"""Of the references that were loaded: a user's code, wherever it is installed."""

_IMPORTED = "--imported-by-codistill"
"""All that a user's code finds in `sys.argv`: no parser knows it, so none takes codistill's arguments or its own defaults."""

_hidden: list[list[str]] = []
"""The arguments that each :func:`users_code` at work hides; the command's own come first."""

_FORM = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")


class LoadError(ValueError):
    """A callable that an experiment names cannot be loaded; the text is one line for people."""

    code = ExitCode.CONFIGURATION


def is_reference(text: str) -> bool:
    """Return whether a text has the form `package.module:callable`."""
    return _FORM.fullmatch(text) is not None


def load(reference: str, field: str) -> Callable[..., Any]:
    """Import a callable by its name.

    Args:
        reference: `package.module:callable`; Python looks for the module in installed packages, on PYTHONPATH, and then
            beside the experiment.
        field: the experiment's field that holds the reference, for errors.

    Raises:
        LoadError: the text has another form, the module is missing or cannot be imported, or it has no such callable. Or
            another module of its name hides one beside the experiment.
    """
    form = _FORM.fullmatch(reference)
    if form is None:
        raise LoadError(f"{field}: {reference!r} is not of the form package.module:callable")
    module_name, name = form.groups()
    modules_beside.search()
    hidden = modules_beside.shadow(module_name)
    if hidden is not None:
        raise LoadError(
            f"{field}: {reference!r}: for Python the module {module_name.partition('.')[0]!r} is {hidden[0]}, and not "
            f"{hidden[1]} beside the experiment; rename that file, and give its new name here"
        )
    declare_missing_operators()
    try:
        with users_code(f"{field}: {reference!r}", spare=lambda error: isinstance(error, ModuleNotFoundError)):
            module = _imported(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name != missing and not module_name.startswith(f"{missing}."):
            # The module is there; something that it imports is not.
            raise LoadError(f"{field}: {reference!r}: {explain_error(error)}") from error
        raise LoadError(
            f"{field}: {reference!r}: there is no module {missing!r}; install it, put it beside the experiment file, or "
            f"add its folder to PYTHONPATH{_in_working_folder(module_name)}"
        ) from error
    _packages.add(module_name.partition(".")[0])
    named = getattr(module, name, None)
    if callable(named):
        return cast("Callable[..., Any]", named)
    if named is not None:
        raise LoadError(f"{field}: {reference!r} is of type {type(named).__name__}; expected a callable")
    candidates = [other for other, value in vars(module).items() if callable(value) and not other.startswith("_")]
    close = difflib.get_close_matches(name, candidates, 1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise LoadError(
        f"{field}: {reference!r}: module {module_name!r} has no {name!r}; {hint}"
        f"It has: {shorten(sorted(candidates)) or 'nothing to call'}"
    )


def _imported(name: str) -> ModuleType:
    """Import a user's module; what it draws meanwhile is the same in every process."""
    from codistill.process.randomness import seeded  # torch takes seconds, and few commands load a user's code

    with seeded(0):
        return importlib.import_module(name)


def call(reference: str, field: str, arguments: Mapping[str, Any]) -> Any:
    """Return the result of a callable, called with an experiment's arguments.

    Raises:
        LoadError: as :func:`load`, or the callable does not take an argument, or raised an error.
    """
    function = load(reference, field)
    names = accepted_arguments(function)
    for name in arguments:
        if names is not None and name not in names:
            raise LoadError(
                f"distillation.parameters.{name}: {reference!r} has no such argument; accepted: "
                f"{', '.join(sorted(names)) or 'none'}"
            )
    with users_code(f"{field}: {reference!r}"):
        return function(**arguments)


@contextlib.contextmanager
def users_code(
    where: str,
    error_type: Callable[[str], Exception] = LoadError,
    *,
    spare: Callable[[BaseException], bool] = lambda _: False,
    place: Callable[[], str] = str,
) -> Generator[None]:
    """Raise what a user's code raises as an error of one line.

    What is no Exception is such an error too, as an attempt to end the process: a LoadError whatever `error_type` is, as its
    cause stays. A signal's KeyboardInterrupt stays as it is. On the main thread, `sys.argv` holds no argument of codistill's meanwhile.

    Args:
        where: begins the error's text: the experiment's field and reference, or the participant.
        error_type: makes the error from its text.
        spare: returns whether an error is raised as it is.
        place: returns FILE:LINE of the user's code, for an error that no line of it raised; or an empty text.
    """
    swaps = threading.current_thread() is threading.main_thread()
    if swaps:
        _hidden.append(sys.argv)
        sys.argv = [_program(where), _IMPORTED]
    try:
        yield
    except BaseException as error:
        if is_interrupt(error) or spare(error):
            raise
        made = error_type if isinstance(error, Exception) else LoadError
        raise made(f"{where}: {explain_error(error, place())}") from error
    finally:
        if swaps:
            sys.argv = _hidden.pop()


def command_arguments() -> list[str]:
    """Return the arguments of this process's command, also where a user's code may run and does not find them."""
    return (_hidden[0] if _hidden else sys.argv)[1:]


def _program(where: str) -> str:
    """Return the user's file for the usage line of a parser, from a text that holds its reference."""
    form = _FORM.search(where)
    return f"{form[1].replace('.', '/')}.py" if form else "your code"


def _in_working_folder(module_name: str) -> str:
    top = Path.cwd() / module_name.partition(".")[0]
    found = next((path for path in (top.with_name(f"{top.name}.py"), top) if path.exists()), None)
    return f"; {found} is not looked at, as nothing is loaded from the working folder" if found else ""


def explain_error(error: BaseException, place: str = "") -> str:
    """Return an error of a user's code as one line: its type, the user's line that raised it, and its text.

    Args:
        error: what was raised.
        place: FILE:LINE of the user's code, for an error that was raised where no line of the user's was running.
    """
    text = " ".join(str(error).split())
    kind = type(error).__name__
    if isinstance(error, SyntaxError):
        return f"{kind}: {text}"  # which names the file and the line already
    frames = list(traceback.walk_tb(error.__traceback__))
    users = _users_frames(error) or ([] if place else frames)
    place = f" at {f'{users[-1][0].f_code.co_filename}:{users[-1][1]}' if users else place}" if users or place else ""
    if isinstance(error, SystemExit):
        kind = f"{kind}: {text}" if text else kind
        if any(frame.f_code.co_name == "<module>" for frame, _ in users):
            return (
                f"it ended the process while it was imported ({kind}{place}); put what a program does, such as parse_args, "
                'under `if __name__ == "__main__":`'
            )
        return f"it ended the process ({kind}{place}); let it return, or raise an error that says what is wrong"
    return f"{kind}{place}{': ' if text else ''}{text}"


def code_place(function: Callable[..., object]) -> str:
    """Return FILE:LINE of a function or a class's constructor, or an empty text where it is not known."""
    unwrapped = inspect.unwrap(function)
    code = getattr(unwrapped, "__code__", None) or getattr(getattr(unwrapped, "__init__", None), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else ""


def is_users(module: str, file: str) -> bool:
    """Return whether code is a user's own: neither codistill's nor that of an installed package."""
    return module.partition(".")[0] not in _OURS and not file.startswith(_NOT_THE_USERS)


def raised_by_user(error: BaseException) -> bool:
    """Return whether a user's code raised an error, or called what raised it."""
    return bool(_users_frames(error))


def _users_frames(error: BaseException) -> list[tuple[FrameType, int]]:
    """Return the frames and lines of a user's own files, else those of an installed package that an experiment names."""
    frames = list(traceback.walk_tb(error.__traceback__))
    own = [frame for frame in frames if is_users(_module(frame[0]), frame[0].f_code.co_filename)]
    return own or [frame for frame in frames if _module(frame[0]).partition(".")[0] in _packages - _NO_PLUGINS - _OURS]


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))


def shorten(names: Sequence[str]) -> str:
    """Return names for a message: all of a few, else the first ones and the number of the others."""
    if len(names) <= 2 * _SHOWN:
        return ", ".join(names)
    return f"{', '.join(names[:_SHOWN])} and {len(names) - _SHOWN} more"


def accepted_arguments(function: Callable[..., Any]) -> set[str] | None:
    """Return the names of the keyword arguments that a callable takes, or None if it takes any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a built-in that has no signature to read
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {
        parameter.name
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
