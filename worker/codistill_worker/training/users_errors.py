"""Errors of a user's model as errors that name the model, the user's line and, where it is known, what to do."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

from codistill.config.experiment import Experiment
from codistill.config.participants import Student, Teacher
from codistill.peer.errors import PeerError
from codistill.process import plugins
from codistill.process.exit_codes import ExitCode
from codistill.rundir.storage import outlasts_restarts
from codistill_worker.errors import ConfigurationError, is_devices_fault
from codistill_worker.training.outputs import OutputError

__all__ = ["explained", "model_title", "running", "users_place"]

_ADVICE = {
    "Expected more than 1 value per channel": "batch normalisation needs two samples at least: raise training.batch_size",
    "does not require grad": "the loss has no gradient: remove detach or torch.no_grad from the model or the method",
    "modified by an inplace operation": "let the forward pass make a new tensor where it changes one in place",
    "backward through the graph a second time": "detach what is kept from one step to the next",
}
"""Advice by a part of torch's own text."""


@contextmanager
def explained(problem: str, place: Callable[[], str] = str) -> Generator[None]:
    """Raise every error as ConfigurationError, but the device's and those that have an exit code.

    Args:
        problem: the text before the error, its line and its own text.
        place: returns FILE:LINE of the user's code, for an error that no line of it raised; or an empty text.

    Raises:
        ConfigurationError: the user's code raised an error, or its outputs do not fit.
        LoadError: the user's code raised what is no Exception, as an attempt to end the process.
    """
    try:
        with plugins.users_code(problem, _advised, spare=_is_settled, place=place):
            yield
    except OutputError as error:
        raise ConfigurationError(f"{problem}: {error}") from error


@contextmanager
def running(problem: str) -> Generator[None]:
    """Raise a user's errors as :func:`explained` does, and others by their participant, so that a restart is tried.

    A restarted worker repeats its steps, so a user's error would come again. An error in which no line of a user's has a
    part may be the machine's.

    Args:
        problem: the text before the error, its line and its own text.

    Raises:
        ConfigurationError, LoadError: as :func:`explained`.
        PeerError: another error, with ERROR.
    """
    try:
        with plugins.users_code(
            problem, _advised, spare=lambda error: _is_settled(error) or not plugins.raised_by_user(error)
        ):
            yield
    except OutputError as error:
        raise ConfigurationError(f"{problem}: {error}") from error
    except Exception as error:
        if _is_settled(error) or isinstance(error, OSError):
            raise
        raise PeerError(f"{problem}: {plugins.explain_error(error)}{_advice(str(error))}") from error


def model_title(experiment: Experiment, participant: Student | Teacher) -> str:
    """Return a participant's model for people: "students.1.model: 'own:net' of student 'a'"."""
    is_student = isinstance(participant, Student)
    role, names = ("student", experiment.names) if is_student else ("teacher", experiment.teacher_names)
    position = names.index(participant.name)
    return f"{role}s.{position}.model: {participant.model!r} of {role} {participant.name!r}"


def users_place(reference: str) -> str:
    """Return FILE:LINE of a user's callable; an empty text for a built-in or a library's model."""
    if not plugins.is_reference(reference) or reference.partition(":")[0] in ("timm", "torchvision"):
        return ""
    return plugins.code_place(plugins.load(reference, "model"))


def _advised(message: str) -> ConfigurationError:
    return ConfigurationError(message + _advice(message))


def _advice(message: str) -> str:
    return next((f"; {advice}" for text, advice in _ADVICE.items() if text in message), "")


def _is_settled(error: BaseException) -> bool:
    """Return whether an error has an exit code, or gets one elsewhere."""
    if isinstance(getattr(error, "code", None), ExitCode) or isinstance(error, OutputError) or is_devices_fault(error):
        return True
    return isinstance(error, OSError) and outlasts_restarts(error)
