"""What a report shows, as one JSON document: pure, and the only thing that the page's script draws from.

A run's document:

- ``kind``: ``"run"``; ``title``; ``complete``.
- ``run``: method, data set, seed, epochs and the like; times in seconds (``started`` since 1970-01-01 UTC).
- ``students``: name, model, parameters, device; ``final`` (the test measurement after the last epoch) or null; ``latest``
  (the last test measurement) or null; the series ``test`` and ``train`` as columns; step and wait in seconds; ``last``
  (rounds in which it was the last to contribute) and ``missed`` (seconds for which it was the only one missing);
  ``restarts``, how often its worker was started again; ``joins``, how often it joined; ``missed_rounds``, those that closed
  without it.
- ``rounds``: the spans as columns; ``x`` says whether their position is an epoch or a round.
- ``disagreement``: the last value of each pair of ``pairs``, and the ``lines`` to draw: one for each pair, or with more than
  :data:`PAIRS` of them each student's mean over its pairs.
- ``events``: oldest first; ``offset`` is in seconds since ``started``.

A comparison's document: ``kind`` ``"comparison"``, ``methods``, ``baseline``, ``seeds``, ``students`` and ``means`` with a
result for each method, ``incomplete``, ``runs`` with a summary of each, and ``pictures`` (SVG of the gains).

Numbers that are not finite become null. A series is cut down to :data:`LIMIT` points, of five significant digits but for
the last, which is the tables' and rounds as theirs does.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from codistill.records import Measured, RoundsClosed
from codistill_deploy.comparison import Comparison, MethodRun, Result, Spread
from codistill_deploy.history import RESTARTED, History, StudentHistory, longest_wait, median_wait, waited_for
from codistill_deploy.report.figure import gain_svg

__all__ = ["LIMIT", "PAIRS", "comparison_document", "grouped", "run_document", "thinned"]

LIMIT = 500
"""The most points of a series."""

PAIRS = 10
"""The most pairs of students whose disagreement is drawn pair by pair."""


def thinned(count: int, limit: int = LIMIT) -> list[int]:
    """Returns which of `count` points of a curve to draw: evenly spaced, the first and the last among them.

    Series of the same length keep the same points, so students measured together stay comparable.
    """
    if count <= limit:
        return list(range(count))
    return [round(position * (count - 1) / (limit - 1)) for position in range(limit)]


def grouped(count: int, limit: int = LIMIT) -> list[range]:
    """Returns how to merge `count` spans into at most `limit` groups of neighbours, so that no maximum is lost."""
    groups = min(count, limit)
    return [range(number * count // groups, (number + 1) * count // groups) for number in range(groups)]


def run_document(history: History) -> dict[str, Any]:
    """Returns the document of a run; see the module for its form."""
    experiment = history.experiment
    return {
        "kind": "run",
        "title": experiment.name,
        "complete": history.complete,
        "run": {
            "method": experiment.distillation.title,
            "exchanges": experiment.distillation.exchanges,
            "dataset": experiment.data.dataset,
            "train_size": experiment.data.train_size,
            "seed": experiment.seed,
            "epochs": experiment.training.epochs,
            "batch_size": experiment.training.batch_size,
            "optimizer": experiment.training.optimizer.name,
            "lr": experiment.training.optimizer.lr,
            "schedule": experiment.training.schedule.name,
            "created": history.info.created.isoformat() if history.info.created else None,
            "mode": history.info.mode,
            "versions": history.info.versions,
            "machine": {key: str(value) for key, value in history.info.machine.items()},
            "command": list(history.info.command),
            "started": _number(history.started),
            "seconds": _number(history.seconds),
            "total_rounds": history.total_rounds,
            "closed_rounds": history.closed_rounds,
            "median_wait": _number(median_wait(history.rounds)),
            "longest_wait": _number(longest_wait(history.rounds)),
            "without_targets": history.rounds_without_targets,
            "ensemble_accuracy": _number(history.ensemble_accuracy),
            "server_restarts": sum(event.what == RESTARTED and not event.student for event in history.events),
        },
        "students": [_student(student, history) for student in history.students],
        "rounds": _rounds(history),
        "disagreement": _disagreement(history),
        "events": [
            {
                "time": _number(event.time),
                "offset": _number(event.time - (history.started or 0.0)),
                "what": event.what,
                "student": event.student,
                "message": event.message,
            }
            for event in history.events
        ],
    }


def comparison_document(comparison: Comparison, title: str) -> dict[str, Any]:
    """Returns the document of a comparison; see the module for its form."""
    return {
        "kind": "comparison",
        "title": title,
        "methods": list(comparison.methods),
        "baseline": comparison.baseline,
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
            {"method": each.method, "seed": each.seed, "path": each.path, "reason": each.reason}
            for each in comparison.incomplete
        ],
        "runs": [_compared(run) for run in comparison.runs],
        "pictures": {"wide": gain_svg(comparison, width=1072), "narrow": gain_svg(comparison, width=370)}
        if _has_gains(comparison)
        else None,
    }


def _student(student: StudentHistory, history: History) -> dict[str, Any]:
    blocked = history.waits.get(student.name)
    return {
        "name": student.name,
        "model": f"{student.model} (teacher)" if student.teacher else student.model,
        "parameters": student.parameters,
        "device": student.device,
        "final": _point(student.final),
        "latest": _point(student.test[-1] if student.test else None),
        "test": _series(student.test),
        "train": _series(student.train),
        "step": _number(student.step_seconds),
        "wait": _number(student.wait_seconds),
        "last": blocked.rounds if blocked else 0,
        "missed": _number(blocked.seconds) if blocked else 0.0,
        "restarts": student.restarts,
        "joins": student.joins,
        "missed_rounds": student.missed_rounds,
    }


def _point(measured: Measured | None) -> dict[str, Any] | None:
    if measured is None:
        return None
    return {"epoch": measured.epoch, "accuracy": _number(measured.accuracy), "loss": _number(measured.loss)}


def _series(series: Sequence[Measured]) -> dict[str, Any]:
    kept = [series[index] for index in thinned(len(series))]
    return {
        "count": len(series),
        "epoch": [_short(each.epoch) for each in kept],
        "accuracy": _column(each.accuracy for each in kept),
        "loss": _column(each.loss for each in kept),
        "distillation": _column(each.distillation_loss for each in kept)
        if any(each.distillation_loss is not None for each in kept)
        else [],
    }


def _rounds(history: History) -> dict[str, Any]:
    spans = history.rounds
    groups = [spans[group.start : group.stop] for group in grouped(len(spans))]
    known = [span for span in spans if span.ensemble_accuracy is not None]
    drawn = [known[index] for index in thinned(len(known))]
    blocked = [(waited_for(group), _length(group)) for group in groups]
    return {
        "x": _axis(history),
        "spans": len(spans),
        "round": [group[-1].last + 1 for group in groups],
        "median": [_short(median_wait(group)) for group in groups],
        "longest": [_short(longest_wait(group)) for group in groups],
        "blocked": {
            student.name: [
                _short(waits[student.name].seconds / length) if student.name in waits else 0
                for waits, length in blocked
            ]
            for student in history.students
        },
        "ensemble": {
            "position": [_position(history, span.last) for span in drawn],
            "accuracy": _column(span.ensemble_accuracy for span in drawn),
        },
    }


def _disagreement(history: History) -> dict[str, Any]:
    order = {student.name: number for number, student in enumerate(history.students)}
    series: dict[tuple[str, str], dict[int, float]] = {}
    for span in history.rounds:
        for pair, ratio in span.disagreement.items():
            first, _, second = pair.partition("|")
            if first in order and second in order:
                series.setdefault((first, second), {})[span.last] = ratio
    pairs = sorted(series, key=lambda pair: (order[pair[0]], order[pair[1]]))
    lines: dict[tuple[str, ...], dict[int, float]] = {}
    if len(pairs) <= PAIRS:
        lines = {pair: series[pair] for pair in pairs}
    else:
        for name in order:
            values: dict[int, list[float]] = {}
            for pair in pairs:
                if name in pair:
                    for last, ratio in series[pair].items():
                        values.setdefault(last, []).append(ratio)
            if values:
                lines[name,] = {last: statistics.fmean(values[last]) for last in sorted(values)}
    return {
        "x": _axis(history),
        "pairs": [
            {"first": pair[0], "second": pair[1], "latest": _number(list(series[pair].values())[-1])} for pair in pairs
        ],
        "lines": [
            {"students": list(students), **_line(history, list(values.items()))} for students, values in lines.items()
        ],
    }


def _line(history: History, points: Sequence[tuple[int, float]]) -> dict[str, Any]:
    kept = [points[index] for index in thinned(len(points))]
    return {"position": [_position(history, last) for last, _ in kept], "ratio": _column(ratio for _, ratio in kept)}


def _axis(history: History) -> str:
    return "epoch" if history.total_rounds else "round"


def _position(history: History, last: int) -> float | None:
    epoch = history.epoch(last + 1)
    return _short(float(last + 1) if epoch is None else epoch)


def _length(spans: Sequence[RoundsClosed]) -> int:
    return sum(span.last - span.first + 1 for span in spans)


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
    kept = [(result.curve.epochs[index], result.curve.accuracy[index]) for index in thinned(len(result.curve.epochs))]

    def edge(sign: int) -> Callable[[Spread], float | None]:
        def value(spread: Spread) -> float | None:
            mean, deviation = spread.mean, spread.deviation
            return None if mean is None or deviation is None else _short(mean + sign * deviation)

        return value

    low, high = edge(-1), edge(1)
    return {
        "epoch": [_short(epoch) for epoch, _ in kept],
        "mean": _column(spread.mean for _, spread in kept),
        "low": [low(spread) for _, spread in kept],
        "high": [high(spread) for _, spread in kept],
    }


def _has_gains(comparison: Comparison) -> bool:
    return any(
        result.gain and result.gain.values for student in comparison.students for result in student.results.values()
    )


def _settings(runs: Sequence[MethodRun]) -> dict[str, Any] | None:
    """Returns what all runs have in common, from the first that can be read."""
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


def _compared(run: MethodRun) -> dict[str, Any]:
    history = run.history
    summary: dict[str, Any] = {
        "method": run.method,
        "seed": run.seed,
        "path": run.path,
        "report": None,
        "problem": run.problem,
    }
    if history is None:
        return summary
    blocking = max(history.waits.items(), key=lambda item: item[1].seconds, default=None)
    return {
        **summary,
        "report": f"{quote(run.path)}/report.html" if run.path else None,
        "complete": history.complete,
        "seconds": _number(history.seconds),
        "rounds": history.closed_rounds,
        "median_wait": _number(median_wait(history.rounds)),
        "longest_wait": _number(longest_wait(history.rounds)),
        "blocking": None if blocking is None else {"student": blocking[0], "seconds": _number(blocking[1].seconds)},
        "events": dict(sorted(Counter(event.what for event in history.events).items())),
    }


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _column(values: Iterable[float | None]) -> list[float | None]:
    """Returns a series' numbers, the last that is known unrounded: to round it twice might show another number."""
    known = [_number(value) for value in values]
    last = max((index for index, value in enumerate(known) if value is not None), default=-1)
    return [value if index == last else _short(value) for index, value in enumerate(known)]


def _short(value: float | None) -> float | None:
    """Returns a number with five significant digits: more than any screen shows, and half the bytes."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")
