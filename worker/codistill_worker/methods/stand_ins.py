"""Targets that mean nothing, of the names and shapes of a method's, for a student that has no server yet."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch

from codistill.config.methods import Custom, Distillation
from codistill.methods import Aggregator, Arrays, RoundInputs
from codistill.process import plugins
from codistill_worker.methods.registry import teaches_hidden_layers

__all__ = ["stand_in_targets"]

_log = logging.getLogger(__name__)
_SEED = 0
_Shapes = Mapping[str, tuple[int, ...]]


def stand_in_targets(
    distillation: Distillation,
    student: str,
    students: Sequence[str],
    teachers: Sequence[str],
    labels: torch.Tensor,
    classes: int,
    published: _Shapes,
    teacher_shapes: Callable[[], _Shapes],
) -> Arrays:
    """Return one student's targets of a round; empty where the method exchanges nothing.

    Those of a user's method are made by the user's aggregator, from outputs that mean nothing. If it cannot be used here,
    they are empty: the server says what is wrong with it.

    Args:
        distillation: the experiment's section.
        student: the student's name.
        students: all students' names.
        teachers: the teachers' names.
        labels: the samples' classes, int64 of shape [B].
        classes: the number of classes, C.
        published: the shapes of the outputs that the student publishes, without the samples.
        teacher_shapes: returns the shapes of a teacher's outputs, likewise.

    Returns:
        float32 on the CPU: all names of the built-in methods, for example `logits` and `probabilities` [B, C].
    """
    if not distillation.exchanges:
        return {}
    drawn = torch.Generator().manual_seed(_SEED)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=drawn)

    batch = len(labels)
    if isinstance(distillation, Custom):
        outputs = {name: draw(len(students), batch, *shape) for name, shape in published.items()}
        of_teachers = {name: {"logits": draw(batch, classes)} for name in teachers}
        return _of_users(distillation, student, RoundInputs(tuple(students), outputs, labels, of_teachers))
    stages = sum(name.startswith("logits") for name in published)
    targets = {
        "logits": draw(batch, classes),
        "probabilities": draw(batch, classes).softmax(-1),
        "divergence": draw(batch).abs(),
        "same": draw(batch, stages, classes).softmax(-1),
        "other": draw(batch, stages, classes).softmax(-1),
    }
    if teaches_hidden_layers(distillation):
        targets |= {name: draw(batch, *shape) for name, shape in teacher_shapes().items()}
    return targets


def _of_users(settings: Custom, student: str, inputs: RoundInputs) -> Arrays:
    try:
        aggregator: Aggregator = plugins.call(settings.server, "distillation.server", settings.parameters)
        made = aggregator.targets(inputs)
        targets = (made.each or {}).get(student, made.shared) or {}
        return {name: value.detach().float() for name, value in targets.items()}
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's code may raise anything
        _log.debug("distillation.server: %s makes no targets here: %s", settings.server, plugins.explain_error(error))
        return {}
