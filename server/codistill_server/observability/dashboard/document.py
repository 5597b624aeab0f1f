"""The content of a run's page as one JSON document: a pure function of the records, and the script's only source.

A run's document:

- ``kind``: ``"run"``; ``title``; ``complete``.
- ``run``: method, data set, seed, epochs and the like; times in seconds (``started`` since 1970-01-01 UTC).
- ``participants``: for each its name, ``role`` ("student" or "teacher"), model, parameters and device, and:

  - ``final``, ``latest``, ``best``: the test measurement after the last epoch, the last one, and the one with the highest
    accuracy; each may be null.
  - ``test``, ``train``: the series as columns, against ``epochs_trained``.
  - ``step_seconds``, ``wait_seconds``: the time of a step, and of it the wait for targets.
  - ``last_to_contribute``: the number of rounds in which it was the last.
  - ``waited_for_seconds``: the seconds for which it was the only one missing.
  - ``restarts``, ``joins``: how often its worker was started again, and how often it joined.
  - ``missed_rounds``: how many rounds closed without it.

- ``rounds``: the spans as columns. ``x`` says whether their ``position`` is an epoch or a step. ``waited_for`` has, for each
  participant, the mean time of a round for which it was the only one missing.
- ``disagreement``: the last value of each pair of students, and the ``lines`` to draw. They are one for each pair. With
  more than :data:`PAIRS` pairs, they are one for each student: the mean over its pairs.
- ``events``: oldest first, each with its ``participant``, if any; ``offset`` is in seconds since ``started``.

Numbers that are not finite become null. A series is thinned out to at most
:data:`~codistill_server.observability.dashboard.downsample.LIMIT` points, of five significant digits. The last point is
exact, as tables show it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from codistill.rundir.history import History, ParticipantHistory
from codistill.rundir.records import Measured, RoundsClosed
from codistill.rundir.spans import length, longest_wait, median_wait, waited_for
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.words import word
from codistill_server.observability.dashboard.downsample import column, evenly_spaced, finite, neighbour_groups, rounded

__all__ = ["PAIRS", "run_document"]

PAIRS = 10
"""The most pairs of students whose disagreement is drawn pair by pair."""


def run_document(history: History) -> dict[str, Any]:
    """Return the document of a run; see the module for its form."""
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
            "started": finite(history.started),
            "seconds": finite(history.seconds),
            "total_rounds": history.total_rounds,
            "total_steps": history.total_steps,
            "closed_rounds": history.closed_rounds,
            "median_wait": finite(median_wait(history.rounds)),
            "longest_wait": finite(longest_wait(history.rounds)),
            "rounds_without_targets": history.rounds_without_targets,
            "ensemble_accuracy": finite(history.ensemble_accuracy),
            "server_restarts": history.server_restarts,
        },
        "participants": [_participant(participant, history) for participant in history.participants],
        "rounds": _rounds(history),
        "disagreement": _disagreement(history),
        "events": [
            {
                "time": finite(event.time),
                "offset": finite(event.time - (history.started or 0.0)),
                "what": event.what,
                "participant": event.participant,
                "message": event.message,
            }
            for event in history.events
        ],
    }


def _participant(participant: ParticipantHistory, history: History) -> dict[str, Any]:
    waited_for = history.waits.get(participant.name)
    return {
        "name": participant.name,
        "role": word(pb.Role, pb.ROLE_TEACHER if participant.teacher else pb.ROLE_STUDENT),
        "model": participant.model,
        "parameters": participant.parameters,
        "device": participant.device,
        "final": _point(participant.final),
        "latest": _point(participant.test[-1] if participant.test else None),
        "best": _point(participant.best),
        "test": _series(participant.test, participant.test_count),
        "train": _series(participant.train, participant.train_count),
        "step_seconds": finite(participant.step_seconds),
        "wait_seconds": finite(participant.wait_seconds),
        "last_to_contribute": waited_for.rounds if waited_for else 0,
        "waited_for_seconds": finite(waited_for.seconds) if waited_for else 0.0,
        "restarts": participant.restarts,
        "joins": participant.joins,
        "missed_rounds": participant.missed_rounds,
    }


def _point(measured: Measured | None) -> dict[str, Any] | None:
    if measured is None:
        return None
    return {
        "epochs_trained": measured.epochs_trained,
        "accuracy": finite(measured.accuracy),
        "loss": finite(measured.loss),
    }


def _series(series: Sequence[Measured], count: int) -> dict[str, Any]:
    kept = [series[index] for index in evenly_spaced(len(series))]
    return {
        "count": count,
        "epochs_trained": [rounded(measured.epochs_trained) for measured in kept],
        "accuracy": column(measured.accuracy for measured in kept),
        "loss": column(measured.loss for measured in kept),
        "distillation_loss": column(measured.distillation_loss for measured in kept)
        if any(measured.distillation_loss is not None for measured in kept)
        else [],
    }


def _rounds(history: History) -> dict[str, Any]:
    spans = history.rounds
    groups = [spans[group.start : group.stop] for group in neighbour_groups(len(spans))]
    known = [span for span in spans if span.ensemble_accuracy is not None]
    drawn = [known[index] for index in evenly_spaced(len(known))]
    waits_of_groups = [(waited_for(group), sum(map(length, group))) for group in groups]
    return {
        "x": _axis(history),
        "spans": len(spans),
        "position": [_position(history, group[-1]) for group in groups],
        "median": [rounded(median_wait(group)) for group in groups],
        "longest": [rounded(longest_wait(group)) for group in groups],
        "waited_for": {
            participant.name: [
                rounded(waits[participant.name].seconds / rounds) if participant.name in waits else 0
                for waits, rounds in waits_of_groups
            ]
            for participant in history.participants
        },
        "ensemble": {
            "position": [_position(history, span) for span in drawn],
            "accuracy": column(span.ensemble_accuracy for span in drawn),
        },
    }


def _disagreement(history: History) -> dict[str, Any]:
    order = {student.name: place for place, student in enumerate(history.students)}
    known = [span for span in history.rounds if span.disagreement]
    latest: dict[str, float] = {}
    for span in known:
        latest |= span.disagreement
    pairs = {pair: (first, second) for pair in latest for first, _, second in [pair.partition("|")]}
    shown = sorted(
        (pair for pair, (first, second) in pairs.items() if first in order and second in order),
        key=lambda pair: (order[pairs[pair][0]], order[pairs[pair][1]]),
    )
    if len(shown) <= PAIRS:
        lines = {pairs[pair]: [pair] for pair in shown}
    else:
        lines = {(name,): [pair for pair in shown if name in pairs[pair]] for name in order}
    drawn = [known[index] for index in evenly_spaced(len(known))]
    return {
        "x": _axis(history),
        "pairs": [
            {"first": pairs[pair][0], "second": pairs[pair][1], "latest": finite(latest[pair])} for pair in shown
        ],
        "lines": [{"students": list(students), **_line(history, drawn, of)} for students, of in lines.items() if of],
    }


def _line(history: History, spans: Sequence[RoundsClosed], pairs: Sequence[str]) -> dict[str, Any]:
    """Return the mean disagreement of some pairs, at the spans that hold one of them."""
    points: list[tuple[RoundsClosed, float]] = []
    for span in spans:
        ratios = [span.disagreement[pair] for pair in pairs if pair in span.disagreement]
        if ratios:
            points.append((span, sum(ratios) / len(ratios)))
    return {"position": [_position(history, span) for span, _ in points], "ratio": column(ratio for _, ratio in points)}


def _axis(history: History) -> str:
    return "epoch" if history.total_steps else "step"


def _position(history: History, span: RoundsClosed) -> float | None:
    """Return where a span ends, in epochs; in steps where an epoch's length is not known."""
    epoch = history.epoch(span.steps_trained)
    return rounded(float(span.steps_trained) if epoch is None else epoch)
