from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from codistill.v1 import distillation_pb2 as pb
from codistill_deploy.console import progress
from codistill_deploy.console.progress import LiveView, PlainView, make_view, status_table, waiting_line


def run_at(number: int, *, waiting: float = 0.0, complete: bool = False) -> pb.Run:
    student = pb.StudentStatus(
        name="cnn",
        model="resnet8",
        state=pb.STUDENT_STATE_FINISHED if complete else pb.STUDENT_STATE_PRESENT,
        round=number,
        epoch=number / 10,
        measurements=[pb.Measurement(split=pb.SPLIT_TEST, round=number, accuracy=0.912, loss=0.3)],
        step_seconds=0.0123,
        wait_seconds=0.0045,
    )
    slow = pb.StudentStatus(name="vit", model="vit", state=pb.STUDENT_STATE_ABSENT, round=number - 1)
    return pb.Run(
        name="digits",
        method="kdcl/min_logit",
        frontier=number,
        total_rounds=40,
        students=[student, slow],
        waiting_for=["vit"] if waiting else [],
        waiting_seconds=waiting,
        complete=complete,
    )


def printed(renderable: object) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_shows_every_student() -> None:
    lines = printed(status_table(run_at(20))).splitlines()
    assert lines[0].split() == ["student", "model", "state", "round", "epoch", "train", "test", "step", "wait"]
    assert lines[1].split() == ["cnn", "resnet8", "training", "20", "2.0", "91.2", "%", "12.3", "ms", "4.5", "ms"]
    assert lines[2].split() == ["vit", "vit", "absent", "19", "0.0"]


def test_a_teacher_is_told_from_a_student() -> None:
    run = run_at(20)
    run.students.add(name="old", model="cnn", state=pb.STUDENT_STATE_PRESENT, round=20, teacher=True)
    assert printed(status_table(run)).splitlines()[3].split()[:5] == ["old", "(teacher)", "cnn", "training", "20"]


def test_what_was_missed_has_columns_where_anything_was() -> None:
    run = run_at(20)
    run.students[0].joins = run.students[1].joins = 1
    assert "missed" not in printed(status_table(run))
    run.students[1].missed_rounds = 7
    lines = printed(status_table(run)).splitlines()
    assert lines[0].split()[-2:] == ["wait", "missed"]
    assert [line.split()[-1] for line in lines[1:]] == ["0", "7"]
    run.students[1].joins = 2
    lines = printed(status_table(run)).splitlines()
    assert lines[0].split()[-2:] == ["missed", "joins"]
    assert [line.split()[-2:] for line in lines[1:]] == [["0", "1"], ["7", "2"]]
    run.students[1].missed_rounds = 0
    assert printed(status_table(run)).splitlines()[0].split()[-2:] == ["wait", "joins"]


def test_who_is_waited_for_is_named_only_when_it_matters() -> None:
    assert waiting_line(run_at(20, waiting=0.5)) == ""
    assert waiting_line(run_at(20, waiting=12)) == "round 20 has waited 12 s for vit"
    assert "absent, waited for" in printed(status_table(run_at(20, waiting=12)))


def test_plain_lines_come_seldom_and_the_last_always(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=200)
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    view = PlainView(console)
    view.start("digits")
    for number in range(1, 21):
        now[0] += 0.5
        view.update(run_at(number))
    view.update(run_at(40, complete=True))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        "digits: starting",
        "digits: round 10/40; test accuracy: cnn 91.2 %, vit –",
        "digits: round 20/40; test accuracy: cnn 91.2 %, vit –",
        "digits: round 39/40; test accuracy: cnn 91.2 %, vit –",
    ]


def test_an_offered_state_is_asked_for_only_when_it_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    asked: list[float] = []

    def snapshot() -> pb.Run:
        asked.append(now[0])
        return run_at(3)

    view = PlainView(Console(quiet=True))
    view.start("digits")
    for _ in range(24):
        now[0] += 0.5
        view.offer(snapshot)
    assert asked == [5.0, 10.0]


def test_a_terminal_gets_the_live_table() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    view = make_view(console)
    assert isinstance(view, LiveView)
    view.start("digits")
    view.update(run_at(20, waiting=7))
    view.note("a line")
    view.finish()
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    for fragment in ("20/40 rounds", "cnn", "resnet8", "91.2 %", "round 20 has waited 7 s for vit", "a line"):
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
    view = LiveView(console)
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
    assert isinstance(make_view(Console(file=io.StringIO())), PlainView)
