"""A command's own process: where modules are found, what its user's code may not do, and what a signal does."""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from codistill.config.experiment import Experiment, load
from codistill.process import modules_beside
from codistill.process.interrupts import raise_interrupt
from codistill_deploy.supervise.isolation import FOLDERS_VARIABLE

__all__ = ["find_modules_beside", "load_with_absolute_paths", "refusing_exit", "stop_on_signals"]


def find_modules_beside(experiment: Path) -> None:
    """Let `package.module:callable` be found in the experiment file's folder too, behind all that is installed.

    In a process of a run the file is the run's own copy; there the command that started it says which folders are meant.
    """
    folders = os.environ.get(FOLDERS_VARIABLE)
    for folder in [Path(each) for each in folders.split(os.pathsep)] if folders else [experiment.resolve().parent]:
        modules_beside.add_folder(folder)


def load_with_absolute_paths(path: Path) -> Experiment:
    """Read the file of an experiment that is run by this process or by others on this machine.

    Its paths become absolute, as a user's code may change the working folder.

    Raises:
        ExperimentError: the file cannot be read, or does not fit the schema.
    """
    experiment, here = load(path), Path.cwd()
    data = experiment.data.model_copy(update={"root": str(here / experiment.data.root)})
    teachers = [each.model_copy(update={"weights": str(here / each.weights)}) for each in experiment.teachers]
    return experiment.replace(data=data, teachers=tuple(teachers))


def refusing_exit(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that fails if a user's code ends the process, whatever it raises to do so."""

    @functools.wraps(command)
    def checked(*arguments: Any, **named: Any) -> None:
        from codistill.process.plugins import users_code

        with users_code("the experiment's own code", spare=lambda error: isinstance(error, Exception)):
            command(*arguments, **named)

    return checked


def stop_on_signals() -> threading.Event:
    """Return an event that the first Ctrl-C or SIGTERM sets; the second ends the process at once."""
    stop = threading.Event()

    def handle(number: int, frame: object) -> None:
        if stop.is_set():
            raise_interrupt(number, frame)
        stop.set()

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
    return stop
