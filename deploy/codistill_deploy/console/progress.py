"""How a run is watched: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Protocol, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from codistill.v1 import distillation_pb2 as pb

__all__ = ["LiveView", "PlainView", "View", "make_view", "status_table"]

_STATES = {
    pb.STUDENT_STATE_EXPECTED: ("expected", "dim"),
    pb.STUDENT_STATE_PRESENT: ("training", "green"),
    pb.STUDENT_STATE_ABSENT: ("absent", "yellow"),
    pb.STUDENT_STATE_FINISHED: ("finished", "cyan"),
    pb.STUDENT_STATE_FAILED: ("failed", "red"),
}
_LIVE_SECONDS = 0.5
_PLAIN_SECONDS = 5.0
_NOTICE_SECONDS = 3.0


class View(Protocol):
    """Where progress is shown."""

    def start(self, title: str) -> None:
        """Begins to show a run."""
        ...

    def update(self, run: pb.Run) -> None:
        """Shows where the run stands."""
        ...

    def offer(self, snapshot: Callable[[], pb.Run]) -> None:
        """Shows where the run stands, if it is time to; asks for it only then."""
        ...

    def note(self, line: str) -> None:
        """Shows one line."""
        ...

    def finish(self) -> None:
        """Ends showing the run; its last state stays to be read."""
        ...


def make_view(console: Console) -> View:
    """Returns the view that suits where the output goes."""
    return LiveView(console) if console.is_terminal else PlainView(console)


class LiveView:
    """A table that redraws itself.

    What is logged to the same terminal meanwhile is printed above it.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._handlers: list[logging.StreamHandler[TextIO]] = []
        self._title = ""
        self._shown_at = 0.0

    def start(self, title: str) -> None:
        """See :class:`View`."""
        self._title = title
        errors = sys.stderr
        self._live = Live(
            Text(f"{title}: starting …"),
            console=self._console,
            refresh_per_second=4,
            transient=False,
            redirect_stderr=errors.isatty(),  # errors that go to a file stay there
        )
        self._live.start()
        # Handlers hold the stream that they were made with, so they are told of the one that prints above the table.
        self._handlers = [
            handler
            for handler in logging.getLogger().handlers
            if isinstance(handler, logging.StreamHandler) and handler.stream is errors
        ]
        self._log_to_stderr()

    def update(self, run: pb.Run) -> None:
        """See :class:`View`."""
        self._shown_at = time.monotonic()
        if self._live is not None:
            self._live.update(_panel(self._title, run))

    def offer(self, snapshot: Callable[[], pb.Run]) -> None:
        """See :class:`View`."""
        if time.monotonic() - self._shown_at >= _LIVE_SECONDS:
            self.update(snapshot())

    def note(self, line: str) -> None:
        """See :class:`View`."""
        self._console.print(Text(line))

    def finish(self) -> None:
        """See :class:`View`."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            self._log_to_stderr()

    def _log_to_stderr(self) -> None:
        for handler in self._handlers:
            handler.setStream(sys.stderr)


class PlainView:
    """A line every few seconds, for logs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._title = ""
        self._shown_at = 0.0
        self._last = ""

    def start(self, title: str) -> None:
        """See :class:`View`."""
        self._title, self._last = title, ""
        self._shown_at = time.monotonic()
        self.note(f"{title}: starting")

    def update(self, run: pb.Run) -> None:
        """See :class:`View`."""
        if not run.complete and time.monotonic() - self._shown_at < _PLAIN_SECONDS:
            return
        self._shown_at = time.monotonic()
        line = _line(run)
        if line != self._last:
            self._last = line
            self.note(f"{self._title}: {line}")

    def offer(self, snapshot: Callable[[], pb.Run]) -> None:
        """See :class:`View`."""
        if time.monotonic() - self._shown_at >= _PLAIN_SECONDS:
            self.update(snapshot())

    def note(self, line: str) -> None:
        """See :class:`View`."""
        self._console.print(Text(line), soft_wrap=True)

    def finish(self) -> None:
        """See :class:`View`."""


def status_table(run: pb.Run) -> Table:
    """Returns the table of the students of a run.

    Missed rounds, and the sessions of students that joined more than once, have columns where there are any.
    """
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("student")
    table.add_column("model")
    table.add_column("state")
    table.add_column("round", justify="right")
    table.add_column("epoch", justify="right")
    table.add_column("train", justify="right")
    table.add_column("test", justify="right")
    table.add_column("step", justify="right")
    table.add_column("wait", justify="right")
    missed = any(student.missed_rounds for student in run.students)
    rejoined = any(student.joins > 1 for student in run.students)
    if missed:
        table.add_column("missed", justify="right")
    if rejoined:
        table.add_column("joins", justify="right")
    for student in run.students:
        state, style = _STATES.get(student.state, ("?", "red"))
        if student.name in run.waiting_for and run.waiting_seconds > _NOTICE_SECONDS:
            state, style = f"{state}, waited for", "yellow"
        table.add_row(
            Text(f"{student.name} (teacher)" if student.teacher else student.name, style="bold"),
            student.model,
            Text(state, style=style),
            f"{student.round}",
            f"{student.epoch:.1f}",
            _accuracy(student, pb.SPLIT_TRAIN),
            _accuracy(student, pb.SPLIT_TEST),
            _milliseconds(student.step_seconds),
            _milliseconds(student.wait_seconds),
            *([f"{student.missed_rounds}"] if missed else []),
            *([f"{student.joins}"] if rejoined else []),
        )
    return table


def _panel(title: str, run: pb.Run) -> RenderableType:
    done = _rounds_done(run)
    header = Table.grid(padding=(0, 2))
    header.add_row(
        Text(title, style="bold"),
        ProgressBar(total=max(run.total_rounds, 1), completed=done, width=30),
        Text(f"{done}/{run.total_rounds or '?'} rounds"),
        Text(f"{run.rounds_per_second:.0f}/s" if run.rounds_per_second >= 1 else ""),
        Text(f"ensemble {100 * run.ensemble_accuracy:.1f} % (train)" if run.HasField("ensemble_accuracy") else ""),
    )
    parts: list[RenderableType] = [header, status_table(run)]
    waiting = waiting_line(run)
    if waiting:
        parts.append(Text(waiting, style="yellow"))
    return Group(*parts)


def waiting_line(run: pb.Run) -> str:
    """Returns whom the run waits for, or "" while nobody waits long enough to mention it."""
    if not run.waiting_for or run.waiting_seconds < _NOTICE_SECONDS:
        return ""
    return f"round {run.frontier} has waited {run.waiting_seconds:.0f} s for {', '.join(run.waiting_for)}"


def _line(run: pb.Run) -> str:
    students = ", ".join(f"{student.name} {_accuracy(student, pb.SPLIT_TEST) or '–'}" for student in run.students)
    waiting = waiting_line(run)
    return f"round {_rounds_done(run)}/{run.total_rounds or '?'}; test accuracy: {students}" + (
        f"; {waiting}" if waiting else ""
    )


def _rounds_done(run: pb.Run) -> int:
    return min((student.round for student in run.students), default=0) if run.complete else run.frontier


def _accuracy(student: pb.StudentStatus, split: pb.Split.ValueType) -> str:
    found = [each.accuracy for each in student.measurements if each.split == split]
    return f"{100 * found[0]:.1f} %" if found else ""


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds > 0 else ""
