"""A few rounds of a user's aggregator before the first, to find targets that a restarted server would not make again."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from codistill.config.experiment import Experiment
from codistill.config.methods import Custom
from codistill.methods.aggregator import Aggregator, Arrays, Output, RoundInputs, Targets
from codistill.peer.draws import derive
from codistill.process.plugins import LoadError
from codistill.process.randomness import seed_generators, seeded
from codistill.process.unsaved import unsaved_state
from codistill_server.methods.custom import aggregator

__all__ = ["try_aggregator"]

_log = logging.getLogger(__name__)
_ROUNDS = 4
_SAMPLES = 8
_LARGEST = 4


def try_aggregator(experiment: Experiment) -> None:
    """Have two aggregators make the targets of some rounds: one makes all, another begins anew in each.

    Both are given the same outputs, which mean nothing, and the state that the first returned. An aggregator that fails on
    such outputs is left to the run. So is one of a built-in method.

    Raises:
        LoadError: the aggregator cannot be made, its targets depend on more than the inputs, or it holds a generator of
            random numbers. That one may be used later.
    """
    settings = experiment.distillation
    if not isinstance(settings, Custom):
        return
    field = f"distillation.server: {settings.server!r}"
    with seeded(derive(experiment.seed, "aggregator")):
        kept = _made(experiment, settings)
        state: Arrays = {}
        for number in range(_ROUNDS):
            try:
                inputs = _inputs(experiment, kept, number, state)
                first = _targets(experiment, kept, inputs, number)
                second = _targets(experiment, _made(experiment, settings), inputs, number)
            except LoadError as error:
                _log.debug("%s makes no targets in a trial: %s", field, error)
                return
            differing = _differing(first, second)
            if differing:
                raise LoadError(
                    f"{field} made other {differing} for the same outputs in round {number} of a trial when it was created "
                    "anew, as by a server that restarts; let targets depend on the inputs alone, keep what lasts from round "
                    "to round in Targets.state, and draw random numbers from torch, random or numpy.random themselves, "
                    "which are seeded for each round"
                )
            state = first.state
        held = unsaved_state({}, {}, {"aggregator": getattr(kept, "checked", kept)}).generators
        if held:
            names = ", ".join(f"{name} ({kind})" for name, kind in held.items())
            raise LoadError(
                f"{field} holds a generator of random numbers, whose state a restart loses: {names}; draw random numbers from "
                "torch, random or numpy.random themselves, which are seeded for each round"
            )


def _made(experiment: Experiment, settings: Custom) -> Aggregator:
    seed_generators(derive(experiment.seed, "aggregator"))
    return aggregator(settings, experiment.names, experiment.teacher_names)


def _targets(experiment: Experiment, tried: Aggregator, inputs: RoundInputs, number: int) -> Targets:
    seed_generators(derive(experiment.seed, "targets", number))
    copied = {name: value.clone() for name, value in inputs.outputs.items()}
    return tried.targets(replace(inputs, outputs=copied))


def _inputs(experiment: Experiment, tried: Aggregator, number: int, state: Arrays) -> RoundInputs:
    """Return outputs of small shapes that the aggregator takes."""
    drawn = torch.Generator().manual_seed(number)
    classes = experiment.data.class_count

    def draw(outputs: Mapping[str, Output], *first: int) -> dict[str, torch.Tensor]:
        return {
            name: torch.randn((*first, *_shape(output, classes)), generator=drawn) for name, output in outputs.items()
        }

    labels = torch.randint(classes, (_SAMPLES,), generator=drawn)
    teachers = {name: draw(tried.teacher, _SAMPLES) for name in experiment.teacher_names}
    outputs = draw(tried.student, len(experiment.names), _SAMPLES)
    return RoundInputs(tuple(experiment.names), outputs, labels, teachers, state=state)


def _shape(output: Output, classes: int) -> Sequence[int]:
    return [classes if limit is None else min(limit, _LARGEST) for limit in output.limits]


def _differing(first: Targets, second: Targets) -> str:
    """Return the names of the arrays that differ, or an empty text."""
    ours, others = _arrays(first), _arrays(second)
    names = [
        name
        for name in ours.keys() | others.keys()
        if name not in ours or name not in others or not torch.equal(ours[name], others[name])
    ]
    return ", ".join(sorted(names))


def _arrays(targets: Targets) -> dict[str, torch.Tensor]:
    places = {"targets": targets.shared or {}, "state": targets.state}
    places |= {f"targets of {student!r}": arrays for student, arrays in (targets.each or {}).items()}
    return {f"{place} {name!r}": value for place, arrays in places.items() for name, value in arrays.items()}
