"""Runs an experiment with several methods and seeds, one after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from codistill.distillation import Distillation
from codistill.exit_codes import ExitCode
from codistill.experiment import Experiment
from codistill_deploy.comparison import ComparisonIndex, IndexedRun
from codistill_deploy.errors import CommandError
from codistill_deploy.run_folder import RunFolder

__all__ = ["compare", "with_method"]

_DISTILLATION: TypeAdapter[Distillation] = TypeAdapter(Distillation)
METHODS = (
    "independent",
    "kd",
    "logit_regression",
    "vid",
    "rkd_distance",
    "rkd_angle",
    "rkd",
    "fddml",
    "hddml",
    "dml",
    "dcm",
    "kdcl",
    "kdcl/naive",
    "kdcl/linear",
    "kdcl/min_logit",
    "kdcl/general",
    "cross_architecture",
)


def with_method(experiment: Experiment, method: str) -> Experiment:
    """Returns the experiment with another method.

    The experiment's own settings hold where the method is its own; otherwise the method's defaults do. A method that has
    no teachers leaves out the experiment's.

    Args:
        experiment: what to run.
        method: a method's name, "kdcl", or a method with its variant, "kdcl/linear".

    Raises:
        CommandError: there is no such method.
        ExperimentError: the experiment does not meet what the method needs.
    """
    if method not in METHODS:
        raise CommandError(f"--methods: {method!r} is not a method; allowed: {', '.join(METHODS)}")
    name, _, variant = method.partition("/")
    settings = experiment.distillation.model_dump(mode="json")
    if settings["method"] != name:
        settings = {"method": name}
    if variant:
        settings["ensemble"] = variant
    try:
        distillation = _DISTILLATION.validate_python(settings)
        teachers = experiment.teachers if distillation.teachers[1] else ()
        return experiment.replace(distillation=distillation, teachers=teachers)
    except ValidationError as error:
        raise CommandError(f"--methods: {method}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error


def compare(
    experiment: Experiment,
    methods: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    run: Callable[[Experiment, RunFolder, str], ExitCode],
    stop: threading.Event,
    *,
    resume: bool,
) -> ExitCode:
    """Runs every method with every seed; what `folder` already holds whole is not run again.

    Args:
        experiment: what to run; its own seed and method are replaced.
        methods: the methods, see :func:`with_method`.
        seeds: the seeds.
        folder: where the runs go, METHOD/seed-N each, and the comparison's index.
        run: runs one experiment in one folder; is given a title, and the experiment with method and seed.
        stop: set to stop between two runs.
        resume: go on with a comparison that the folder holds.

    Raises:
        CommandError: a run failed, or the folder holds another comparison.
    """
    variants = {method: with_method(experiment, method) for method in methods}
    planned = [
        (
            variants[method].replace(seed=seed),
            IndexedRun(method=variants[method].distillation.title, seed=seed, path=path),
        )
        for seed in seeds
        for method in methods
        for path in [f"{variants[method].distillation.title.replace('/', '-')}/seed-{seed}"]
    ]
    index = ComparisonIndex(
        experiment=experiment.name,
        methods=tuple(dict.fromkeys(each.method for _, each in planned)),
        seeds=tuple(seeds),
        runs=tuple(each for _, each in planned),
    )
    if ComparisonIndex.path(folder).exists() and not resume:
        raise CommandError(f"{folder} already holds a comparison; give --resume to go on with it, or another --run-dir")
    folder.mkdir(parents=True, exist_ok=True)
    index.write(folder)
    for number, (variant, each) in enumerate(planned, 1):
        if stop.is_set():
            return ExitCode.INTERRUPTED
        place = RunFolder(folder / each.path)
        title = f"[{number}/{len(planned)}] {each.method}, seed {each.seed}"
        code = run(variant, place, title)
        if code is not ExitCode.OK:
            return code
    return ExitCode.OK
