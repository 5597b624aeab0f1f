"""The JSON document of a comparison: pure, and all that the script of its page draws from.

Its fields:

- ``kind``: ``"comparison"``.
- ``methods``, ``baseline``, ``seeds``; ``many``: whether methods stand one below the other.
- ``students`` and ``means``: each with a result for each method.
- ``incomplete``, ``left_out``; ``runs``: a summary of each.
- ``pictures``: SVG of the gains.

:mod:`codistill_server.observability.dashboard.document` makes the document of a run, with numbers and series of the same
form.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from codistill.rundir.layout import RunLayout
from codistill.rundir.spans import longest_wait, median_wait
from codistill_deploy.compare.statistics import Comparison, MethodRun, Result, Spread
from codistill_deploy.report.figure import gain_svg
from codistill_server.observability.dashboard.downsample import column, evenly_spaced, finite, rounded

__all__ = ["comparison_document"]


def comparison_document(comparison: Comparison, title: str) -> dict[str, Any]:
    """Return the document of a comparison; see the module for its form."""
    return {
        "kind": "comparison",
        "title": title,
        "methods": list(comparison.methods),
        "baseline": comparison.baseline,
        "many": comparison.many,
        "seeds": list(comparison.seeds),
        "settings": _settings(comparison.runs),
        "students": [
            {
                "name": student.name,
                "model": student.model,
                "parameters": student.parameters,
                "results": _results(student.results),
            }
            for student in comparison.students
        ],
        "means": _results(comparison.means),
        "incomplete": [
            {"method": run.method, "seed": run.seed, "path": run.path, "reason": run.reason}
            for run in comparison.incomplete
        ],
        "left_out": dict(comparison.left_out),
        "runs": [_run_summary(run) for run in comparison.runs],
        "pictures": {"wide": gain_svg(comparison, width=1072), "narrow": gain_svg(comparison, width=370)}
        if _has_gains(comparison)
        else None,
    }


def _results(results: Mapping[str, Result]) -> dict[str, Any]:
    return {
        method: {
            "accuracy": _spread(result.accuracy),
            "gain": None if result.gain is None else _spread(result.gain),
            "curve": _curve(result),
        }
        for method, result in results.items()
    }


def _spread(spread: Spread) -> dict[str, Any]:
    return {
        "mean": spread.mean,
        "deviation": spread.deviation,
        "values": {str(seed): value for seed, value in spread.values.items()},
    }


def _curve(result: Result) -> dict[str, Any]:
    kept = [
        (result.curve.epochs[index], result.curve.accuracy[index]) for index in evenly_spaced(len(result.curve.epochs))
    ]

    def edge(spread: Spread, sign: int) -> float | None:
        mean, deviation = spread.mean, spread.deviation
        return None if mean is None or deviation is None else rounded(mean + sign * deviation)

    return {
        "epochs_trained": [rounded(epochs) for epochs, _ in kept],
        "mean": column(spread.mean for _, spread in kept),
        "low": [edge(spread, -1) for _, spread in kept],
        "high": [edge(spread, 1) for _, spread in kept],
    }


def _has_gains(comparison: Comparison) -> bool:
    return any(
        result.gain and result.gain.values for student in comparison.students for result in student.results.values()
    )


def _settings(runs: Sequence[MethodRun]) -> dict[str, Any] | None:
    """Return what all runs have in common, from the first that can be read."""
    history = next((run.history for run in runs if run.history is not None), None)
    if history is None:
        return None
    experiment = history.experiment
    return {
        "dataset": experiment.data.dataset,
        "train_size": experiment.data.train_size,
        "epochs": experiment.training.epochs,
        "batch_size": experiment.training.batch_size,
        "versions": history.info.versions,
    }


def _run_summary(run: MethodRun) -> dict[str, Any]:
    history = run.history
    summary: dict[str, Any] = {
        "method": run.method,
        "seed": run.seed,
        "path": run.path,
        "report": None,
        "problem": run.problem,
        "teachers": [],
    }
    if history is None:
        return summary
    most_waited_for = max(history.waits.items(), key=lambda item: item[1].seconds, default=None)
    return {
        **summary,
        "teachers": list(history.experiment.teacher_names),
        "report": quote(str(RunLayout(Path(run.path)).report_file)) if run.path else None,
        "complete": history.complete,
        "seconds": finite(history.seconds),
        "closed_rounds": history.closed_rounds,
        "median_wait": finite(median_wait(history.rounds)),
        "longest_wait": finite(longest_wait(history.rounds)),
        "most_waited_for": None
        if most_waited_for is None
        else {"participant": most_waited_for[0], "seconds": finite(most_waited_for[1].seconds)},
        "events": dict(sorted(Counter(event.what for event in history.events).items())),
    }
