"""Runs an experiment with several methods and seeds, one after the other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from codistill.config.experiment import Experiment
from codistill.process.exit_codes import ExitCode
from codistill.rundir.layout import ComparisonLayout
from codistill_deploy.compare import generations
from codistill_deploy.compare.plan import Variant, best_alone, choose
from codistill_deploy.compare.statistics import BASELINE, ComparisonIndex, IndexedRun
from codistill_deploy.errors import CommandError
from codistill_deploy.run_folder import RunFolder

__all__ = ["compare"]


def compare(
    experiment: Experiment,
    methods: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    run: Callable[[Experiment, RunFolder, str], ExitCode],
    stop: threading.Event,
    *,
    check: Callable[[Experiment], None],
    resume: bool,
) -> ExitCode:
    """Runs every method with every seed; what `folder` already holds whole is not run again.

    Args:
        experiment: what to run; its own seed and method are replaced.
        methods: the methods, see :func:`codistill_deploy.compare.plan.choose`.
        seeds: the seeds.
        folder: where the runs go, METHOD/seed-N each, and the comparison's index.
        run: runs one experiment in one folder, or goes on there; is given a title, and the experiment with method and
            seed.
        stop: set to stop between two runs.
        check: raises if an experiment cannot be run here. It is given all before the first is run, but for those whose
            teacher is still to be trained.
        resume: go on with a comparison that the folder holds.

    Raises:
        CommandError: a run failed, or the folder holds another comparison.
        ExperimentError: the experiment does not meet what a method needs.
    """
    variants, left_out = choose(experiment, methods)
    for variant in variants:
        if not variant.finds_teacher:
            check(variant.experiment)
    planned = [_Planned(variant, seed, folder) for seed in seeds for variant in variants]
    index = ComparisonIndex(
        experiment=experiment.name,
        methods=tuple(variant.title for variant in variants),
        seeds=tuple(seeds),
        runs=tuple(each.indexed for each in planned),
        left_out=left_out,
    )
    if ComparisonIndex.path(folder).exists() and not resume:
        raise CommandError(f"{folder} already holds a comparison; give --resume to go on with it, or another --run-dir")
    folder.mkdir(parents=True, exist_ok=True)
    index.write(folder)
    began, ran = time.monotonic(), 0
    for number, each in enumerate(planned, 1):
        left = _to_go(time.monotonic() - began, ran, len(planned) - number + 1)
        ran_here = False
        for one, place, title in each.parts():
            if stop.is_set():
                return ExitCode.INTERRUPTED
            if resume and generations.is_trained(place):
                place.check(one, resume=True)
                continue
            ran_here = True
            code = run(one, place, f"[{number}/{len(planned)}{left}] {title}")
            if code is not ExitCode.OK:
                return code
        ran += ran_here
    return ExitCode.OK


def _to_go(seconds: float, ran: int, left: int) -> str:
    """Returns how long the runs that are left will take, where it can be told and is worth telling."""
    minutes = round(seconds / ran * left / 60) if ran else 0
    if minutes < 1:
        return ""
    return f", {minutes // 60} h {minutes % 60} min to go" if minutes >= 100 else f", {minutes} min to go"


@dataclass(frozen=True)
class _Planned:
    """One method with one seed."""

    variant: Variant
    seed: int
    folder: Path

    @property
    def place(self) -> Path:
        """The folder of the run, or of those of its generations."""
        return ComparisonLayout(self.folder).run(self.variant.title, self.seed)

    @property
    def indexed(self) -> IndexedRun:
        """What is compared: of several generations the last."""
        *_, (_, compared, _) = generations.parts(self.variant.experiment, self.place, self.variant.title)
        path = compared.path.relative_to(self.folder).as_posix()
        return IndexedRun(method=self.variant.title, seed=self.seed, path=path)

    def parts(self) -> list[tuple[Experiment, RunFolder, str]]:
        """Returns what is to be run, one after the other, each with its folder and a title."""
        teacher = None
        if self.variant.finds_teacher:
            teacher = best_alone(
                self.variant.experiment, RunFolder(ComparisonLayout(self.folder).run(BASELINE, self.seed))
            )
        experiment = self.variant.with_seed(self.seed, teacher)
        return generations.parts(experiment, self.place, f"{self.variant.title}, seed {self.seed}")
