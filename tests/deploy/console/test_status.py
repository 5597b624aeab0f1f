"""Where a run stands, as text."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from codistill.rundir.records import Happened
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.times import duration
from codistill_deploy.console.status import print_status, status_document, status_table, waiting_line
from deploy.console.support import run_at


def printed(renderable: object) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_shows_every_participant() -> None:
    lines = printed(status_table(run_at(20))).splitlines()
    heads = ["participant", "model", "state", "steps", "epochs", "train", "test", "step time", "wait time"]
    assert re.split(r"\s{2,}", lines[0].strip()) == heads
    assert lines[1].split() == ["cnn", "resnet8", "connected", "20", "2.0", "91.2", "%", "12.3", "ms", "4.5", "ms"]
    assert lines[2].split() == ["vit", "vit", "disconnected", "19", "0.0"]


def test_who_is_not_awaited_is_skipped() -> None:
    run = run_at(20)
    run.participants[1].awaited = False
    assert "disconnected, skipped" in printed(status_table(run))
    run.participants[0].state, run.participants[0].awaited = pb.PARTICIPANT_STATE_FINISHED, False
    assert "finished, skipped" not in printed(status_table(run)), "nothing of it is missing"
    run.total_rounds = 0
    assert "skipped" not in printed(status_table(run)), "no round can close without it"


def test_a_teacher_is_marked() -> None:
    run = run_at(20)
    run.participants.add(
        name="old",
        role=pb.ROLE_TEACHER,
        model="cnn",
        state=pb.PARTICIPANT_STATE_CONNECTED,
        awaited=True,
        steps_trained=20,
    )
    assert printed(status_table(run)).splitlines()[3].split()[:5] == ["old", "(teacher)", "cnn", "connected", "20"]


def test_missed_rounds_have_a_column_where_there_are_any() -> None:
    run = run_at(20)
    run.participants[0].joins = run.participants[1].joins = 1
    assert "missed rounds" not in printed(status_table(run))
    run.participants[1].missed_rounds = 7
    lines = printed(status_table(run)).splitlines()
    assert lines[0].split()[-4:] == ["wait", "time", "missed", "rounds"]
    assert [line.split()[-1] for line in lines[1:]] == ["0", "7"]
    run.participants[1].joins = 2
    lines = printed(status_table(run)).splitlines()
    assert lines[0].split()[-3:] == ["missed", "rounds", "joins"]
    assert [line.split()[-2:] for line in lines[1:]] == [["0", "1"], ["7", "2"]]
    run.participants[1].missed_rounds = 0
    assert printed(status_table(run)).splitlines()[0].split()[-3:] == ["wait", "time", "joins"]


def test_a_wait_is_shown_only_once_it_is_long() -> None:
    assert waiting_line(run_at(20, waiting=0.5)) == ""
    assert waiting_line(run_at(20, waiting=12)) == "round 10 has waited 12 s for vit"
    assert "disconnected, waited for" in printed(status_table(run_at(20, waiting=12)))


def shown(run: pb.Run, *, terminal: bool = False) -> str:
    console = Console(file=io.StringIO(), width=80, force_terminal=terminal)
    print_status(run, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("kind", "participant", "message", "line"),
    [
        (pb.EVENT_KIND_REFUSED, "cnn", "seed: the run has 0", "cnn refused: seed: the run has 0"),
        (pb.EVENT_KIND_REFUSED, "", "there is no participant 'cow'", "refused: there is no participant 'cow'"),
        (pb.EVENT_KIND_SKIPPED, "vit", "skipped from round 3 on", "vit skipped from round 3 on"),
        (pb.EVENT_KIND_BELOW_QUORUM, "", "round 3 had no targets", "below quorum: round 3 had no targets"),
        (pb.EVENT_KIND_FINISHED, "vit", "", "vit finished"),
    ],
)
def test_an_event_is_shown_by_its_kind(kind: pb.EventKind.ValueType, participant: str, message: str, line: str) -> None:
    run = pb.Run(name="digits", events=[pb.Event(kind=kind, participant=participant, message=message)])
    assert shown(run).splitlines()[-1].split(" ", 1)[1] == line


def test_a_pipe_gets_whole_lines_and_a_terminal_its_width() -> None:
    participants = [
        pb.ParticipantStatus(
            name=name,
            model="vit(depth=4)",
            state=pb.PARTICIPANT_STATE_DISCONNECTED,
            steps_trained=12345,
            epochs_trained=123.4,
            step_time=duration(1.2345),
            wait_time=duration(1.2345),
            measurements=[pb.Measurement(split=split, accuracy=0.5) for split in (pb.SPLIT_TRAIN, pb.SPLIT_TEST)],
        )
        for name in ("the-first-student", "the-second-student")
    ]
    run = pb.Run(name="digits", participants=participants, waiting_for=["the-first-student"], waiting_time=duration(12))
    lines = shown(run).splitlines()
    assert len(lines) == 5, "a title, the table's head, two students, who is waited for"
    assert "disconnected, waited for" in lines[2]
    assert len(lines[2]) > 80
    assert len(shown(run, terminal=True).splitlines()) > 5


@pytest.mark.parametrize(("total", "line"), [(40, "step 20 of 40"), (0, "step 20 of ?")])
def test_the_title_counts_steps(total: int, line: str) -> None:
    run = run_at(20)
    run.total_steps = total
    assert shown(run).splitlines()[0] == f"digits (kdcl/min_logit): {line}"


def test_the_state_as_data_has_the_protos_words_and_all_events_in_order() -> None:
    run = run_at(20, waiting=1.5)
    run.experiment_sha256 = b"\x01\xff"
    for at in (1, 3):
        event = run.events.add(kind=pb.EVENT_KIND_BELOW_QUORUM)
        event.time.seconds = at
    restarted = Happened(time=2.5, what="restarted", participant="cnn", message="was killed")
    data = status_document(run, [restarted])
    assert (data["experiment_sha256"], data["waiting_time"]) == ("01ff", "1.500s")
    first, second = data["participants"]
    assert (first["role"], first["state"], first["measurements"][0]["split"]) == ("student", "connected", "test")
    assert (second["state"], second["awaited"]) == ("disconnected", True)
    assert [(event["time"], event["kind"], event["participant"]) for event in data["events"]] == [
        ("1970-01-01T00:00:01Z", "below_quorum", ""),
        ("1970-01-01T00:00:02.500Z", "restarted", "cnn"),
        ("1970-01-01T00:00:03Z", "below_quorum", ""),
    ]
