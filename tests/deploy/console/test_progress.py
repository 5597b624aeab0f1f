from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from codistill.v1 import distillation_pb2 as pb
from codistill_deploy.console import progress
from codistill_deploy.console.progress import LiveProgress, PlainProgress, make_view
from deploy.console.support import run_at


def test_plain_lines_are_spaced_and_the_last_is_always_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=200)
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    view = PlainProgress(console)
    view.start("digits")
    for step in range(1, 21):
        now[0] += 0.5
        view.update(run_at(step))
    view.update(run_at(40, complete=True))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        "digits: starting",
        "digits: step 10/40; test accuracy: cnn 91.2 %, vit –",
        "digits: step 20/40; test accuracy: cnn 91.2 %, vit –",
        "digits: step 40/40; test accuracy: cnn 91.2 %, vit –",
    ]


def test_an_offered_state_is_asked_for_only_when_it_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    asked: list[float] = []

    def snapshot() -> pb.Run:
        asked.append(now[0])
        return run_at(3)

    view = PlainProgress(Console(quiet=True))
    view.start("digits")
    for _ in range(24):
        now[0] += 0.5
        view.offer(snapshot)
    assert asked == [5.0, 10.0]


def test_a_terminal_gets_the_live_table() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    view = make_view(console)
    assert isinstance(view, LiveProgress)
    view.start("digits")
    view.update(run_at(20, waiting=7))
    view.note("a line")
    view.finish()
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    for fragment in ("20/40 steps", "cnn", "resnet8", "91.2 %", "round 10 has waited 7 s for vit", "a line"):
        assert fragment in shown


class Errors(io.StringIO):
    """A standard error that is a terminal or not."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_logged_goes_above_the_table_or_where_errors_go(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    errors = Errors(terminal)
    monkeypatch.setattr("sys.stderr", errors)
    handler = logging.StreamHandler()  # holds what sys.stderr is now
    log = logging.getLogger()
    log.addHandler(handler)
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    assert isinstance(console.file, io.StringIO)
    view = LiveProgress(console)
    try:
        view.start("digits")
        log.warning("while it is drawn")
        view.finish()
        log.warning("afterwards")
    finally:
        log.removeHandler(handler)
    shown = console.file.getvalue()
    assert ("while it is drawn" in shown) is terminal
    assert "afterwards" not in shown
    expected = ["afterwards"] if terminal else ["while it is drawn", "afterwards"]
    assert errors.getvalue().splitlines() == expected


def test_elsewhere_plain_lines_do() -> None:
    assert isinstance(make_view(Console(file=io.StringIO())), PlainProgress)
