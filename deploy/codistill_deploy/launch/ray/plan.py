"""What an experiment asks of a Ray cluster, and what a cluster lacks of it; pure, without Ray."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from codistill.config.experiment import Experiment, ExperimentError

__all__ = ["Bundle", "amount", "bundles", "check_devices", "shortage"]

_CPU, _GPU = "CPU", "GPU"
_KINDS = (_CPU, _GPU)


@dataclass(frozen=True)
class Bundle:
    """What one actor needs on one node.

    Attributes:
        title: whose it is, as people call it.
        cpus: its CPUs.
        gpus: its GPUs; below 1 it shares one.
    """

    title: str
    cpus: int
    gpus: float = 0.0

    @property
    def resources(self) -> dict[str, float]:
        """The bundle in Ray's words."""
        return {_CPU: float(self.cpus), **({_GPU: self.gpus} if self.gpus else {})}


def check_devices(experiment: Experiment, source: str) -> None:
    """Checks that nobody asks for a GPU by its number: on a cluster each sees the one that it was given, as the first.

    Raises:
        ExperimentError: one does; a line for each.
    """
    asking = [(f"students.{index}", experiment.plan(name).training) for index, name in enumerate(experiment.names)]
    asking += [
        (f"teachers.{index}", experiment.teacher_plan(name).training)
        for index, name in enumerate(experiment.teacher_names)
    ]
    problems = [
        f"{place}.training.device: {training.device!r} is one machine's GPU; on Ray each is given one; allowed: auto, cpu, "
        "cuda"
        for place, training in asking
        if ":" in training.device
    ]
    if problems:
        raise ExperimentError(source, problems)


def bundles(experiment: Experiment, gpus: float, gpus_per_student: float | None = None) -> list[Bundle]:
    """Returns the server's bundle, then each student's and each teacher's in the experiment's order.

    The server asks for one CPU, the others for as many as they have threads. With `device: cuda` one asks for a GPU too, with
    `auto` where the cluster has some when the run starts.

    Args:
        experiment: what is run.
        gpus: how many the cluster has.
        gpus_per_student: how much of one each asks for; None for a whole one, or where there are fewer than
            want one, for the share that lets all of them in.
    """
    asking = [
        *((f"student {name!r}", experiment.plan(name).training) for name in experiment.names),
        *((f"teacher {name!r}", experiment.teacher_plan(name).training) for name in experiment.teacher_names),
    ]
    wants = [each.device == "cuda" or (each.device == "auto" and gpus > 0) for _, each in asking]
    share = _share(sum(wants), gpus) if gpus_per_student is None else gpus_per_student
    return [
        Bundle("the server", 1),
        *(
            Bundle(title, each.threads, share if wanted else 0.0)
            for (title, each), wanted in zip(asking, wants, strict=True)
        ),
    ]


def shortage(
    asked: Sequence[Bundle],
    nodes: Sequence[Mapping[str, float]],
    free: Mapping[str, float],
    placed: Sequence[Bundle] = (),
) -> str:
    """Returns what a cluster lacks of what is asked for, as half a sentence that says what it has.

    Args:
        asked: the bundles that are to be placed.
        nodes: what each node has in all.
        free: what of it is free, on all nodes together.
        placed: the run's bundles that have their place already.
    """
    have = {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in _KINDS}
    there = f"the cluster has {amount(have)} on {len(nodes)} node{'' if len(nodes) == 1 else 's'}, {amount(free)} free"
    left = [dict(node) for node in nodes]
    pending: list[Bundle] = []
    for bundle in (*_largest_first(placed), *_largest_first(asked)):
        place = next((node for node in left if _fits(bundle, node)), None)
        if place is None:
            pending += [bundle] if bundle in asked else []
            continue
        for kind, number in bundle.resources.items():
            place[kind] -= number
    if not pending:
        return f"others use what it needs: {there}"
    who = "; ".join(f"{bundle.title} needs {amount(bundle.resources)}" for bundle in pending)
    return f"{who}, and no node has that left for it; {there}"


def amount(resources: Mapping[str, float]) -> str:
    """Returns a number of CPUs and GPUs in words."""
    cpus, gpus = resources.get(_CPU, 0.0), resources.get(_GPU, 0.0)
    return f"{_count(cpus, 'CPU')} and {_count(gpus, 'GPU')}"


def _share(wanting: int, gpus: float) -> float:
    """Returns the largest 1/k with which all students that want a GPU find room on those that there are."""
    if gpus < 1 or wanting <= gpus:
        return 1.0
    # Ray counts in 1/10,000, and must not find k shares to be more than one.
    return math.floor(10_000 / math.ceil(wanting / math.floor(gpus))) / 10_000


def _largest_first(bundles: Sequence[Bundle]) -> list[Bundle]:
    """Returns bundles in the order in which they look for a place: the largest has the fewest."""
    return sorted(bundles, key=lambda each: (each.gpus, each.cpus), reverse=True)


def _fits(bundle: Bundle, node: Mapping[str, float]) -> bool:
    return all(node.get(kind, 0.0) >= number for kind, number in bundle.resources.items())


def _count(number: float, what: str) -> str:
    return f"{number:g} {what}{'' if number == 1 else 's'}"
