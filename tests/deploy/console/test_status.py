"""Where a run stands, as text."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from codistill.v1 import distillation_pb2 as pb
from codistill_deploy.console.status import print_status, status_table, waiting_line
from deploy.console.support import run_at


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


def test_a_teacher_is_marked() -> None:
    run = run_at(20)
    run.students.add(name="old", model="cnn", state=pb.STUDENT_STATE_PRESENT, round=20, teacher=True)
    assert printed(status_table(run)).splitlines()[3].split()[:5] == ["old", "(teacher)", "cnn", "training", "20"]


def test_missed_rounds_have_a_column_where_there_are_any() -> None:
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


def test_a_wait_is_shown_only_once_it_is_long() -> None:
    assert waiting_line(run_at(20, waiting=0.5)) == ""
    assert waiting_line(run_at(20, waiting=12)) == "round 20 has waited 12 s for vit"
    assert "absent, waited for" in printed(status_table(run_at(20, waiting=12)))


def shown(run: pb.Run, *, terminal: bool = False) -> str:
    console = Console(file=io.StringIO(), width=80, force_terminal=terminal)
    print_status(run, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("kind", "student", "message", "line"),
    [
        ("refused", "cnn", "seed: the run has 0", "cnn refused: seed: the run has 0"),
        ("refused", "", "there is no student 'cow'", "refused: there is no student 'cow'"),
        ("absent", "vit", "absent from round 3 on", "vit absent from round 3 on"),
        ("finished", "vit", "", "vit finished"),
    ],
)
def test_an_event_is_shown_by_its_kind(kind: str, student: str, message: str, line: str) -> None:
    run = pb.Run(name="digits", events=[pb.Event(unix_seconds=1, kind=kind, student=student, message=message)])
    assert shown(run).splitlines()[-1].split(" ", 1)[1] == line


def test_a_pipe_gets_whole_lines_and_a_terminal_its_width() -> None:
    students = [
        pb.StudentStatus(
            name=name,
            model="vit(depth=4)",
            state=pb.STUDENT_STATE_ABSENT,
            round=12345,
            epoch=123.4,
            step_seconds=1.2345,
            wait_seconds=1.2345,
            measurements=[pb.Measurement(split=split, accuracy=0.5) for split in (pb.SPLIT_TRAIN, pb.SPLIT_TEST)],
        )
        for name in ("the-first-student", "the-second-student")
    ]
    run = pb.Run(name="digits", students=students, waiting_for=["the-first-student"], waiting_seconds=12)
    lines = shown(run).splitlines()
    assert len(lines) == 5, "a title, the table's head, two students, who is waited for"
    assert "absent, waited for" in lines[2]
    assert len(lines[2]) > 80
    assert len(shown(run, terminal=True).splitlines()) > 5
