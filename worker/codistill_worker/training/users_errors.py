"""The errors of a user's model or method in training, as errors of the experiment."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from codistill.config.experiment import Experiment
from codistill.peer.errors import PeerError
from codistill.process import plugins
from codistill.process.exit_codes import ExitCode
from codistill.rundir.storage import outlasts_restarts
from codistill_worker.errors import ConfigurationError, is_devices_fault
from codistill_worker.training.outputs import OutputError

__all__ = ["explained", "model_field", "running"]


def model_field(experiment: Experiment, name: str) -> str:
    """Return the field and value of a participant's model for a message, and the participant's name."""
    if name in experiment.teacher_names:
        plan = experiment.teacher_plan(name).teacher
        return f"teachers.{experiment.teacher_names.index(name)}.model: {plan.model!r} of teacher {name!r}"
    plan = experiment.plan(name).student
    return f"students.{experiment.names.index(name)}.model: {plan.model!r} of student {name!r}"


@contextmanager
def explained(problem: str) -> Generator[None]:
    """Raise every error as ConfigurationError, but the device's and those that have an exit code.

    Args:
        problem: the text before the error, its line and its own text.

    Raises:
        ConfigurationError: the user's code raised an error, or its outputs do not fit.
        LoadError: the user's code raised what is no Exception, as an attempt to end the process.
    """
    try:
        with plugins.users_code(problem, ConfigurationError, spare=_is_settled):
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
            problem, ConfigurationError, spare=lambda error: _is_settled(error) or not plugins.is_users(error)
        ):
            yield
    except OutputError as error:
        raise ConfigurationError(f"{problem}: {error}") from error
    except Exception as error:
        if _is_settled(error) or isinstance(error, OSError):
            raise
        raise PeerError(f"{problem}: {plugins.explain_error(error)}") from error


def _is_settled(error: BaseException) -> bool:
    """Return whether an error has an exit code, or gets one elsewhere."""
    if isinstance(getattr(error, "code", None), ExitCode) or isinstance(error, OutputError) or is_devices_fault(error):
        return True
    return isinstance(error, OSError) and outlasts_restarts(error)
