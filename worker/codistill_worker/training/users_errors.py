"""The errors of a user's model or method in training, as errors of the experiment."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager

from codistill.config.experiment import Experiment
from codistill.config.participants import Student, Teacher
from codistill.peer.errors import PeerError
from codistill.process import plugins
from codistill.process.plugins import LoadError
from codistill_worker.errors import ConfigurationError, is_devices_fault

__all__ = ["code_place", "explained", "model_title", "users_place"]

_ADVICE = {
    "Expected more than 1 value per channel": "batch normalisation needs two samples at least: raise training.batch_size",
    "does not require grad": "the loss has no gradient: remove detach or torch.no_grad from the model or the method",
    "modified by an inplace operation": "let the forward pass make a new tensor where it changes one in place",
    "backward through the graph a second time": "detach what is kept from one step to the next",
}
"""What to do, by a part of torch's own text."""


@contextmanager
def explained(problem: str, place: Callable[[], str] = str) -> Generator[None]:
    """Raise what a user's code raises as ConfigurationError; leave the device's errors and codistill's own.

    Args:
        problem: the text before the error, its line and its own text.
        place: returns FILE:LINE of the user's code, for an error that no line of it raised; or an empty text.
    """
    try:
        yield
    except (PeerError, LoadError):
        raise
    except (Exception, SystemExit) as error:
        if is_devices_fault(error):
            raise
        advice = next((f"; {advice}" for text, advice in _ADVICE.items() if text in str(error)), "")
        raise ConfigurationError(f"{problem}: {plugins.explain_error(error, place())}{advice}") from error


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
    return code_place(plugins.load(reference, "model"))


def code_place(function: Callable[..., object]) -> str:
    """Return FILE:LINE of a function or a class's constructor, or an empty text where it is not known."""
    unwrapped = inspect.unwrap(function)
    code = getattr(unwrapped, "__code__", None) or getattr(getattr(unwrapped, "__init__", None), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else ""
