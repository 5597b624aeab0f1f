"""What can be found wrong with an experiment before any process is started."""

from __future__ import annotations

from codistill.experiment import Experiment
from codistill_worker import models
from codistill_worker.app import choose_device

__all__ = ["check"]


def check(experiment: Experiment) -> None:
    """Checks that every student's model is known and its device there.

    Raises:
        ConfigurationError: one is not; the text names it and what is allowed.
    """
    for position, student in enumerate(experiment.students):
        models.check(student.model)
        choose_device(experiment.plan(student.name).training.device, position)
