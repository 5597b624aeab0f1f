"""Where a run stands, as text: the table of its students, who is waited for, its last events."""

from __future__ import annotations

from datetime import UTC, datetime

from rich.console import Console
from rich.table import Table

from codistill.v1 import distillation_pb2 as pb
from codistill_deploy.console.literal import literal, make_console

__all__ = ["format_accuracy", "print_status", "status_table", "waiting_line"]

_STATES = {
    pb.STUDENT_STATE_EXPECTED: ("expected", "dim"),
    pb.STUDENT_STATE_PRESENT: ("training", "green"),
    pb.STUDENT_STATE_ABSENT: ("absent", "yellow"),
    pb.STUDENT_STATE_FINISHED: ("finished", "cyan"),
    pb.STUDENT_STATE_FAILED: ("failed", "red"),
}
_COLUMNS = ("student", "model", "state")
_NUMBER_COLUMNS = ("round", "epoch", "train", "test", "step", "wait")
_WAIT_SECONDS = 3.0  # a shorter wait is not worth a line
_EVENTS = 5
_UNBOUNDED = 10_000


def print_status(run: pb.Run, console: Console) -> None:
    """Print where a run stands, whom it waits for, and what happened last."""
    if not console.is_terminal:  # a file or a pipe has no width to wrap for
        console = make_console(file=console.file, width=_UNBOUNDED)
    stage = "complete" if run.complete else f"round {run.frontier} of {run.total_rounds or '?'}"
    rate = f", {run.rounds_per_second:.1f} rounds/s" if run.rounds_per_second else ""
    console.print(literal(f"{run.name} ({run.method}): {stage}{rate}", style="bold"))
    console.print(status_table(run))
    if run.waiting_for and run.waiting_seconds > 0:
        console.print(
            literal(f"round {run.frontier} has waited {run.waiting_seconds:.1f} s for {', '.join(run.waiting_for)}"),
            soft_wrap=True,
        )
    for event in run.events[-_EVENTS:]:
        console.print(literal(_event_line(event), style="dim"), soft_wrap=True)


def _event_line(event: pb.Event) -> str:
    time = datetime.fromtimestamp(event.unix_seconds, UTC).astimezone().strftime("%H:%M:%S")
    student = f" {event.student}" if event.student else ""
    if not event.message:
        return f"{time}{student} {event.kind}"
    message = event.message if event.message.startswith(event.kind) else f"{event.kind}: {event.message}"
    return f"{time}{student} {message}"


def status_table(run: pb.Run) -> Table:
    """Return the table of the students of a run.

    Missed rounds, and the sessions of students that joined more than once, have columns where there are any.
    """
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in _COLUMNS:
        table.add_column(name)
    missed = any(student.missed_rounds for student in run.students)
    rejoined = any(student.joins > 1 for student in run.students)
    for name in (*_NUMBER_COLUMNS, *(["missed"] if missed else []), *(["joins"] if rejoined else [])):
        table.add_column(name, justify="right")
    for student in run.students:
        state, style = _STATES.get(student.state, ("?", "red"))
        if student.name in run.waiting_for and run.waiting_seconds > _WAIT_SECONDS:
            state, style = f"{state}, waited for", "yellow"
        table.add_row(
            literal(f"{student.name} (teacher)" if student.teacher else student.name, style="bold"),
            literal(student.model),
            literal(state, style=style),
            f"{student.round}",
            f"{student.epoch:.1f}",
            format_accuracy(student, pb.SPLIT_TRAIN),
            format_accuracy(student, pb.SPLIT_TEST),
            _format_milliseconds(student.step_seconds),
            _format_milliseconds(student.wait_seconds),
            *([f"{student.missed_rounds}"] if missed else []),
            *([f"{student.joins}"] if rejoined else []),
        )
    return table


def waiting_line(run: pb.Run) -> str:
    """Return whom the run waits for, or "" where the wait is too short to mention."""
    if not run.waiting_for or run.waiting_seconds < _WAIT_SECONDS:
        return ""
    return f"round {run.frontier} has waited {run.waiting_seconds:.0f} s for {', '.join(run.waiting_for)}"


def format_accuracy(student: pb.StudentStatus, split: pb.Split.ValueType) -> str:
    """Return a student's last accuracy on a split in percent, or "" before the first."""
    found = [measurement.accuracy for measurement in student.measurements if measurement.split == split]
    return f"{100 * found[0]:.1f} %" if found else ""


def _format_milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds > 0 else ""
