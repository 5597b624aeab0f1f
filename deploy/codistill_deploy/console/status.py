"""Where a run stands, as text and as JSON: its participants, who is waited for, its last events."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console
from rich.table import Table

from codistill.rundir.records import Happened
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.times import seconds
from codistill.wire.words import word
from codistill_deploy.console.literal import literal, make_console

__all__ = ["format_accuracy", "print_status", "status_document", "status_table", "waiting_line"]

_STYLES = {
    pb.PARTICIPANT_STATE_EXPECTED: "dim",
    pb.PARTICIPANT_STATE_CONNECTED: "green",
    pb.PARTICIPANT_STATE_DISCONNECTED: "yellow",
    pb.PARTICIPANT_STATE_FINISHED: "cyan",
    pb.PARTICIPANT_STATE_FAILED: "red",
}
_COLUMNS = ("participant", "model", "state")
_NUMBER_COLUMNS = ("steps", "epochs", "train", "test", "step time", "wait time")
_WAIT_SECONDS = 3.0  # a shorter wait is not worth a line
_EVENTS = 5
_UNBOUNDED = 10_000


def print_status(run: pb.Run, console: Console, more: Sequence[Happened] = ()) -> None:
    """Print where a run stands, whom it waits for, and what happened last.

    Args:
        run: where the run stands.
        console: where to print.
        more: events that the server does not know of.
    """
    if not console.is_terminal:  # a file or a pipe has no width to wrap for
        console = make_console(file=console.file, width=_UNBOUNDED)
    stage = "complete" if run.complete else f"step {run.steps_trained} of {run.total_steps or '?'}"
    rate = f", {run.rounds_per_second:.1f} rounds/s" if run.rounds_per_second else ""
    console.print(literal(f"{run.name} ({run.method}): {stage}{rate}", style="bold"))
    console.print(status_table(run))
    waited = seconds(run.waiting_time)
    if run.waiting_for and waited > 0:
        console.print(
            literal(f"round {run.frontier} has waited {waited:.1f} s for {', '.join(run.waiting_for)}"),
            soft_wrap=True,
        )
    events = sorted((*map(_happened, run.events), *more), key=lambda event: event.time)
    for event in events[-_EVENTS:]:
        console.print(literal(_event_line(event), style="dim"), soft_wrap=True)


def status_document(run: pb.Run, more: Sequence[Happened] = ()) -> dict[str, Any]:
    """Return the state of a run as plain data: the proto's fields and words, times as protobuf writes them in JSON.

    Args:
        run: where the run stands.
        more: events that the server does not know of.
    """
    fields = MessageToDict(run, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    fields["experiment_sha256"] = run.experiment_sha256.hex()
    for participant, status in zip(fields["participants"], run.participants, strict=True):
        participant["role"] = word(pb.Role, status.role)
        participant["state"] = word(pb.ParticipantState, status.state)
        for measurement, measured in zip(participant["measurements"], status.measurements, strict=True):
            measurement["split"] = word(pb.Split, measured.split)
    events = sorted((*map(_happened, run.events), *more), key=lambda event: event.time)
    fields["events"] = [
        {
            "time": _timestamp(event.time),
            "kind": event.what,
            "participant": event.participant,
            "message": event.message,
        }
        for event in events
    ]
    return fields


def _happened(event: pb.Event) -> Happened:
    return Happened(
        time=event.time.seconds + event.time.nanos / 1e9,
        what=word(pb.EventKind, event.kind),
        participant=event.participant,
        message=event.message,
    )


def _timestamp(time: float) -> str:
    timestamp = Timestamp()
    timestamp.FromMicroseconds(round(1e6 * time))
    return timestamp.ToJsonString()


def _event_line(event: Happened) -> str:
    time = datetime.fromtimestamp(event.time, UTC).astimezone().strftime("%H:%M:%S")
    participant = f" {event.participant}" if event.participant else ""
    kind = event.what.replace("_", " ")
    if not event.message:
        return f"{time}{participant} {kind}"
    message = event.message if event.message.startswith(kind) else f"{kind}: {event.message}"
    return f"{time}{participant} {message}"


def status_table(run: pb.Run) -> Table:
    """Return the table of the participants of a run.

    Missed rounds, and the sessions of those that joined more than once, have columns where there are any.
    """
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in _COLUMNS:
        table.add_column(name)
    missed = any(participant.missed_rounds for participant in run.participants)
    rejoined = any(participant.joins > 1 for participant in run.participants)
    for name in (*_NUMBER_COLUMNS, *(["missed rounds"] if missed else []), *(["joins"] if rejoined else [])):
        table.add_column(name, justify="right")
    for participant in run.participants:
        state, style = _state(run, participant)
        teaches = participant.role == pb.ROLE_TEACHER
        table.add_row(
            literal(f"{participant.name} (teacher)" if teaches else participant.name, style="bold"),
            literal(participant.model),
            literal(state, style=style),
            f"{participant.steps_trained}",
            f"{participant.epochs_trained:.1f}",
            format_accuracy(participant, pb.SPLIT_TRAIN),
            format_accuracy(participant, pb.SPLIT_TEST),
            _format_milliseconds(seconds(participant.step_time)),
            _format_milliseconds(seconds(participant.wait_time)),
            *([f"{participant.missed_rounds}"] if missed else []),
            *([f"{participant.joins}"] if rejoined else []),
        )
    return table


def _state(run: pb.Run, participant: pb.ParticipantStatus) -> tuple[str, str]:
    """Return the text and the style of a participant's state, and whether the run waits for it or skips it."""
    state = word(pb.ParticipantState, participant.state)
    if participant.name in run.waiting_for and seconds(run.waiting_time) > _WAIT_SECONDS:
        return f"{state}, waited for", "yellow"
    skipped = run.total_rounds and not participant.awaited and participant.state != pb.PARTICIPANT_STATE_FINISHED
    return f"{state}, skipped" if skipped else state, _STYLES.get(participant.state, "red")


def waiting_line(run: pb.Run) -> str:
    """Return whom the run waits for, or "" where the wait is too short to mention."""
    waited = seconds(run.waiting_time)
    if not run.waiting_for or waited < _WAIT_SECONDS:
        return ""
    return f"round {run.frontier} has waited {waited:.0f} s for {', '.join(run.waiting_for)}"


def format_accuracy(participant: pb.ParticipantStatus, split: pb.Split.ValueType) -> str:
    """Return a participant's last accuracy on a split in percent, or "" before the first."""
    found = [measurement.accuracy for measurement in participant.measurements if measurement.split == split]
    return f"{100 * found[0]:.1f} %" if found else ""


def _format_milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds > 0 else ""
