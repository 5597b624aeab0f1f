"""What `codistill status` adds to what the server says."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from codistill.records import Happened
from codistill.v1 import distillation_pb2 as pb
from codistill_deploy.errors import CommandError
from codistill_deploy.history import SUPERVISOR_FILE
from codistill_deploy.status import add_supervision, show


def state() -> pb.Run:
    events = [pb.Event(unix_seconds=time, kind="joined", student="cnn", message="joined") for time in (1, 3)]
    return pb.Run(name="digits", method="kdcl", frontier=3, events=events)


def test_restarts_stand_among_the_servers_events(tmp_path: Path) -> None:
    happened = Happened(time=2, what="restarted", student="cnn", message="was killed by SIGKILL; started again")
    (tmp_path / SUPERVISOR_FILE).write_text(happened.model_dump_json() + "\n")
    run = state()
    add_supervision(run, tmp_path)
    assert [event.kind for event in run.events] == ["joined", "restarted", "joined"]
    console = Console(file=io.StringIO(), width=160)
    show(run, console)
    assert isinstance(console.file, io.StringIO)
    assert "cnn: was killed by SIGKILL; started again" in console.file.getvalue()


def test_a_run_without_a_supervisor_has_the_servers_events_alone(tmp_path: Path) -> None:
    run = state()
    add_supervision(run, tmp_path)
    assert run == state()


def test_a_file_that_is_none_of_ours_is_named(tmp_path: Path) -> None:
    (tmp_path / SUPERVISOR_FILE).write_text("nonsense\n")
    with pytest.raises(CommandError, match=rf"{SUPERVISOR_FILE}.*line 1"):
        add_supervision(state(), tmp_path)
