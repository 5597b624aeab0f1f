"""The progress of a run while it goes on: a live table on a terminal, plain lines elsewhere."""

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

from codistill.v1 import distillation_pb2 as pb
from codistill_deploy.console.literal import literal
from codistill_deploy.console.status import format_accuracy, status_table, waiting_line

__all__ = ["LiveProgress", "PlainProgress", "ProgressView", "make_view"]

_LIVE_SECONDS = 0.5
_PLAIN_SECONDS = 5.0


class ProgressView(Protocol):
    """Where the progress of a run is shown."""

    def start(self, title: str) -> None:
        """Begin to show a run."""
        ...

    def update(self, run: pb.Run) -> None:
        """Show where the run stands."""
        ...

    def offer(self, snapshot: Callable[[], pb.Run]) -> None:
        """Show where the run stands if it is time to; call `snapshot` only then."""
        ...

    def note(self, line: str) -> None:
        """Show one line."""
        ...

    def finish(self) -> None:
        """Stop showing the run; its last state stays readable."""
        ...


def make_view(console: Console) -> ProgressView:
    """Return the view that suits where the output goes."""
    return LiveProgress(console) if console.is_terminal else PlainProgress(console)


class LiveProgress:
    """A table that redraws itself; what is logged to the same terminal is printed above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._handlers: list[logging.StreamHandler[TextIO]] = []
        self._title = ""
        self._shown_at = 0.0

    def start(self, title: str) -> None:
        """See :class:`ProgressView`."""
        self._title = title
        errors = sys.stderr
        self._live = Live(
            literal(f"{title}: starting …"),
            console=self._console,
            refresh_per_second=4,
            transient=False,
            redirect_stderr=errors.isatty(),  # errors that go to a file stay there
        )
        self._live.start()
        # Handlers hold the stream that they were made with, so they are given the one that prints above the table.
        self._handlers = [
            handler
            for handler in logging.getLogger().handlers
            if isinstance(handler, logging.StreamHandler) and handler.stream is errors
        ]
        self._log_to_stderr()

    def update(self, run: pb.Run) -> None:
        """See :class:`ProgressView`."""
        self._shown_at = time.monotonic()
        if self._live is not None:
            self._live.update(_panel(self._title, run))

    def offer(self, snapshot: Callable[[], pb.Run]) -> None:
        """See :class:`ProgressView`."""
        if time.monotonic() - self._shown_at >= _LIVE_SECONDS:
            self.update(snapshot())

    def note(self, line: str) -> None:
        """See :class:`ProgressView`."""
        self._console.print(literal(line))

    def finish(self) -> None:
        """See :class:`ProgressView`."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            self._log_to_stderr()

    def _log_to_stderr(self) -> None:
        for handler in self._handlers:
            handler.setStream(sys.stderr)


class PlainProgress:
    """A line every few seconds, for logs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._title = ""
        self._shown_at = 0.0
        self._last_line = ""

    def start(self, title: str) -> None:
        """See :class:`ProgressView`."""
        self._title, self._last_line = title, ""
        self._shown_at = time.monotonic()
        self.note(f"{title}: starting")

    def update(self, run: pb.Run) -> None:
        """See :class:`ProgressView`."""
        if not run.complete and time.monotonic() - self._shown_at < _PLAIN_SECONDS:
            return
        self._shown_at = time.monotonic()
        line = _line(run)
        if line != self._last_line:
            self._last_line = line
            self.note(f"{self._title}: {line}")

    def offer(self, snapshot: Callable[[], pb.Run]) -> None:
        """See :class:`ProgressView`."""
        if time.monotonic() - self._shown_at >= _PLAIN_SECONDS:
            self.update(snapshot())

    def note(self, line: str) -> None:
        """See :class:`ProgressView`."""
        self._console.print(literal(line), soft_wrap=True)

    def finish(self) -> None:
        """See :class:`ProgressView`."""


def _panel(title: str, run: pb.Run) -> RenderableType:
    header = Table.grid(padding=(0, 2))
    header.add_row(
        literal(title, style="bold"),
        ProgressBar(total=max(run.total_steps, 1), completed=run.steps_trained, width=30),
        literal(f"{run.steps_trained}/{run.total_steps or '?'} steps"),
        literal(f"{run.rounds_per_second:.0f} rounds/s" if run.rounds_per_second >= 1 else ""),
        literal(f"ensemble {100 * run.ensemble_accuracy:.1f} % (train)" if run.HasField("ensemble_accuracy") else ""),
    )
    lines: list[RenderableType] = [header, status_table(run)]
    waiting = waiting_line(run)
    if waiting:
        lines.append(literal(waiting, style="yellow"))
    return Group(*lines)


def _line(run: pb.Run) -> str:
    accuracies = ", ".join(
        f"{participant.name} {format_accuracy(participant, pb.SPLIT_TEST) or '–'}" for participant in run.participants
    )
    waiting = waiting_line(run)
    return f"step {run.steps_trained}/{run.total_steps or '?'}; test accuracy: {accuracies}" + (
        f"; {waiting}" if waiting else ""
    )
