"""The runs of a comparison: an experiment with several methods and seeds, one after the other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from codistill.config.experiment import Experiment
from codistill.process.exit_codes import ExitCode
from codistill.rundir.files import make_private_folder
from codistill.rundir.layout import ComparisonLayout
from codistill_deploy.compare import generations
from codistill_deploy.compare.index import ComparisonIndex, IndexedRun
from codistill_deploy.compare.plan import Variant, best_alone, choose
from codistill_deploy.compare.statistics import BASELINE
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
    """Run every method with every seed; runs that `folder` already holds to their end are not run again.

    Args:
        experiment: what to run; its own seed and method are replaced.
        methods: the methods, see :func:`codistill_deploy.compare.plan.choose`.
        seeds: the seeds.
        folder: the comparison's folder, for its index and the runs, METHOD/seed-N each.
        run: runs or resumes one experiment in a folder, under a title; method and seed are set.
        stop: set to stop between two runs.
        check: raises if an experiment cannot be run here. All are checked before the first run, but for those whose
            teacher is still to be trained.
        resume: continue the comparison that the folder holds.

    Raises:
        CommandError: a run failed, or the folder holds another comparison.
        ExperimentError: the experiment does not meet the needs of a method.
    """
    variants, left_out = choose(experiment, methods)
    for variant in variants:
        if not variant.finds_teacher:
            check(variant.experiment)
    trainings = [_Training(variant, seed, folder) for seed in seeds for variant in variants]
    index = ComparisonIndex(
        experiment=experiment.name,
        methods=tuple(variant.title for variant in variants),
        seeds=tuple(seeds),
        runs=tuple(training.compared_run for training in trainings),
        left_out=left_out,
    )
    if ComparisonIndex.path(folder).exists() and not resume:
        raise CommandError(f"{folder} already holds a comparison; give --resume to continue it, or another --run-dir")
    make_private_folder(folder)
    index.write(folder)
    began, trained = time.monotonic(), 0
    for position, training in enumerate(trainings, 1):
        remaining = _remaining_time(time.monotonic() - began, trained, len(trainings) - position + 1)
        trained_now = False
        for single, run_folder, title in training.runs():
            if stop.is_set():
                return ExitCode.INTERRUPTED
            if resume and generations.is_trained(run_folder):
                run_folder.check(single, resume=True)
                continue
            trained_now = True
            code = run(single, run_folder, f"[{position}/{len(trainings)}{remaining}] {title}")
            if code is not ExitCode.OK:
                return code
        trained += trained_now
    return ExitCode.OK


def _remaining_time(seconds: float, trained: int, left: int) -> str:
    """Return a text on the time that the trainings left will take; empty where it is unknown or below a minute.

    Args:
        seconds: the time taken so far.
        trained: the number of trainings that took it.
        left: the number of trainings left.
    """
    minutes = round(seconds / trained * left / 60) if trained else 0
    if minutes < 1:
        return ""
    return f", {minutes // 60} h {minutes % 60} min to go" if minutes >= 100 else f", {minutes} min to go"


@dataclass(frozen=True)
class _Training:
    """One method with one seed, in one run or in one for each generation."""

    variant: Variant
    seed: int
    comparison_folder: Path

    @property
    def folder(self) -> Path:
        """The folder of the run, or of the generations' runs."""
        return ComparisonLayout(self.comparison_folder).run(self.variant.title, self.seed)

    @property
    def compared_run(self) -> IndexedRun:
        """The run that is compared: of several generations the last."""
        *_, (_, compared, _) = generations.runs_in_order(self.variant.experiment, self.folder, self.variant.title)
        path = compared.path.relative_to(self.comparison_folder).as_posix()
        return IndexedRun(method=self.variant.title, seed=self.seed, path=path)

    def runs(self) -> list[tuple[Experiment, RunFolder, str]]:
        """Return the runs, first to last, each with its folder and a title."""
        teacher = None
        if self.variant.finds_teacher:
            alone = RunFolder(ComparisonLayout(self.comparison_folder).run(BASELINE, self.seed))
            teacher = best_alone(self.variant.experiment, alone)
        experiment = self.variant.with_seed(self.seed, teacher)
        return generations.runs_in_order(experiment, self.folder, f"{self.variant.title}, seed {self.seed}")
