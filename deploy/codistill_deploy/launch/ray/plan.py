"""The resources that an experiment needs of a Ray cluster, and those that the cluster lacks; pure, without Ray."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from codistill.config.experiment import Experiment, ExperimentError
from codistill.process.gpus import spread

__all__ = ["Bundle", "amount", "bundles", "check_devices", "shortage"]

_CPU, _GPU = "CPU", "GPU"
_KINDS = (_CPU, _GPU)


@dataclass(frozen=True)
class Bundle:
    """The resources of one actor on one node.

    Attributes:
        title: the actor's name for people.
        cpus: its CPUs.
        gpus: its GPUs; below 1 it shares one.
    """

    title: str
    cpus: int
    gpus: float = 0.0

    @property
    def resources(self) -> dict[str, float]:
        """The bundle under Ray's names of resources."""
        return {_CPU: float(self.cpus), **({_GPU: self.gpus} if self.gpus else {})}


def check_devices(experiment: Experiment, source: str) -> None:
    """Check that no participant asks for a GPU by its number: on a cluster each sees the one that it was given, as the first.

    Raises:
        ExperimentError: one does; a line for each.
    """
    settings = [(f"students.{index}", experiment.plan(name).training) for index, name in enumerate(experiment.names)]
    settings += [
        (f"teachers.{index}", experiment.teacher_plan(name).training)
        for index, name in enumerate(experiment.teacher_names)
    ]
    problems = [
        f"{field}.training.device: {training.device!r} is one machine's GPU; on Ray each is given one; allowed: auto, cpu, "
        "cuda"
        for field, training in settings
        if ":" in training.device
    ]
    if problems:
        raise ExperimentError(source, problems)


def bundles(experiment: Experiment, gpus: float, gpus_per_student: float | None = None) -> list[Bundle]:
    """Return the server's bundle, then each student's and each teacher's in the experiment's order.

    The server asks for one CPU, the others for as many as they have threads. With `device: cuda` a worker asks for a GPU
    too; with `auto` it does where the cluster has some when the run starts. Where there are fewer GPUs than such workers,
    they are spread evenly: k of them that share a GPU ask for 1/k of it each.

    Args:
        experiment: what is run.
        gpus: how many the cluster has.
        gpus_per_student: how much of a GPU each asks for. None is a whole one, or an equal part of a shared one.
    """
    settings = [
        *((f"student {name!r}", experiment.plan(name).training) for name in experiment.names),
        *((f"teacher {name!r}", experiment.teacher_plan(name).training) for name in experiment.teacher_names),
    ]
    numbers = spread(experiment.devices, math.floor(gpus))
    uses_gpu = [device == "cuda" or (device == "auto" and gpus > 0) for device in experiment.devices]
    shares = [
        (_share(numbers, number) if gpus_per_student is None else gpus_per_student) if uses else 0.0
        for number, uses in zip(numbers, uses_gpu, strict=True)
    ]
    return [
        Bundle("the server", 1),
        *(Bundle(title, training.threads, share) for (title, training), share in zip(settings, shares, strict=True)),
    ]


def shortage(
    wanted: Sequence[Bundle],
    nodes: Sequence[Mapping[str, float]],
    free: Mapping[str, float],
    placed: Sequence[Bundle] = (),
) -> str:
    """Return what a cluster lacks for some bundles, and what it has, as half a sentence.

    Args:
        wanted: the bundles to place.
        nodes: the resources of each node, free or not.
        free: what of it is free, on all nodes together.
        placed: the run's bundles that have their place already.
    """
    total = {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in _KINDS}
    cluster = (
        f"the cluster has {amount(total)} on {len(nodes)} node{'' if len(nodes) == 1 else 's'}, {amount(free)} free"
    )
    left = [dict(node) for node in nodes]
    pending: list[Bundle] = []
    for bundle in (*_largest_first(placed), *_largest_first(wanted)):
        place = next((node for node in left if _fits(bundle, node)), None)
        if place is None:
            pending += [bundle] if bundle in wanted else []
            continue
        for kind, count in bundle.resources.items():
            place[kind] -= count
    if not pending:
        return f"others use what it needs: {cluster}"
    needs = "; ".join(f"{bundle.title} needs {amount(bundle.resources)}" for bundle in pending)
    return f"{needs}, and no node has that left for it; {cluster}"


def amount(resources: Mapping[str, float]) -> str:
    """Return the CPUs and GPUs of some resources in words."""
    cpus, gpus = resources.get(_CPU, 0.0), resources.get(_GPU, 0.0)
    return f"{_count(cpus, 'CPU')} and {_count(gpus, 'GPU')}"


def _share(numbers: Sequence[int | None], number: int | None) -> float:
    """Return the part of GPU `number` that each of its workers asks for; a whole one where none is there yet."""
    if number is None:
        return 1.0
    # Ray counts in 1/10,000, and must not find k shares to be more than one.
    return math.floor(10_000 / numbers.count(number)) / 10_000


def _largest_first(bundles: Sequence[Bundle]) -> list[Bundle]:
    """Return bundles in the order in which they are placed: fewest nodes suit the largest."""
    return sorted(bundles, key=lambda bundle: (bundle.gpus, bundle.cpus), reverse=True)


def _fits(bundle: Bundle, node: Mapping[str, float]) -> bool:
    return all(node.get(kind, 0.0) >= count for kind, count in bundle.resources.items())


def _count(count: float, noun: str) -> str:
    return f"{count:g} {noun}{'' if count == 1 else 's'}"
