"""The status of a run without a server, from its records."""

from __future__ import annotations

import fcntl
import io
from pathlib import Path

import pytest
from rich.console import Console

from codistill.config.experiment import parse
from codistill.rundir.info import RunInfo
from codistill.rundir.layout import RunLayout
from codistill.rundir.records import Happened, Joined, Measured
from codistill.v1 import distillation_pb2 as pb
from codistill_deploy.console.recorded import add_supervisor_events, describe_recorded
from codistill_deploy.console.status import print_status
from codistill_deploy.errors import CommandError
from codistill_deploy.run_folder import RunFolder


def state() -> pb.Run:
    events = [pb.Event(unix_seconds=time, kind="joined", student="cnn", message="joined") for time in (1, 3)]
    return pb.Run(name="digits", method="kdcl", frontier=3, events=events)


def test_restarts_stand_among_the_servers_events(tmp_path: Path) -> None:
    happened = Happened(time=2, what="restarted", student="cnn", message="was killed by SIGKILL; started again")
    RunLayout(tmp_path).supervisor_file.write_text(happened.model_dump_json() + "\n")
    run = state()
    add_supervisor_events(run, RunLayout(tmp_path))
    assert [event.kind for event in run.events] == ["joined", "restarted", "joined"]
    console = Console(file=io.StringIO(), width=80)
    print_status(run, console)
    assert isinstance(console.file, io.StringIO)
    assert "cnn restarted: was killed by SIGKILL; started again" in console.file.getvalue()


def test_a_run_without_a_supervisor_has_the_servers_events_alone(tmp_path: Path) -> None:
    run = state()
    add_supervisor_events(run, RunLayout(tmp_path))
    assert run == state()


def test_a_file_that_is_none_of_ours_is_named(tmp_path: Path) -> None:
    RunLayout(tmp_path).supervisor_file.write_text("nonsense\n")
    with pytest.raises(CommandError, match=r"supervisor\.jsonl.*line 1"):
        add_supervisor_events(state(), RunLayout(tmp_path))


def left_by(folder: RunFolder, command: list[str], *, rounds: int, epoch: float) -> str:
    """Return the description of a run that got so far and whose server is gone."""
    experiment = parse(
        "name: tiny\ndata: {dataset: digits}\ntraining: {epochs: 4}\n"
        "distillation: {method: independent}\nstudents: [{name: a, model: mlp}]\n"
    )
    folder.join(experiment, supervised=True)
    (folder.path / "run.json").write_text(RunInfo(command=tuple(command)).model_dump_json())
    done = {"student": "a", "split": "test", "round": rounds, "epoch": epoch, "accuracy": 0.9, "loss": 0.1}
    records = (
        Joined(time=0, student="a", model="mlp", parameters=1, device="cpu", total_rounds=40),
        Measured.model_validate({"time": 1, **done}),
    )
    folder.metrics_file.write_text("".join(f"{record.model_dump_json()}\n" for record in records))
    line = describe_recorded(folder)
    assert line is not None
    return line


def test_a_complete_run(tmp_path: Path) -> None:
    line = left_by(RunFolder(tmp_path), ["codistill", "run", "my run.yaml"], rounds=40, epoch=4)
    assert line == "tiny (independent): complete at round 40"


@pytest.mark.parametrize(
    ("command", "resume_command"),
    [
        (["codistill", "run", "my run.yaml"], "codistill run 'my run.yaml' --run-dir {} --resume"),
        (["codistill", "run", "a.yaml", "--run-dir=b", "--resume"], "codistill run a.yaml --run-dir=b --resume"),
        (["codistill", "serve", "a.yaml"], "codistill serve a.yaml --run-dir {}"),
        (["codistill", "compare", "a.yaml"], "codistill run {}/experiment.yaml --run-dir {} --resume"),
    ],
)
def test_a_stopped_run_and_the_command_that_resumes_it(command: list[str], resume_command: str, tmp_path: Path) -> None:
    line = left_by(RunFolder(tmp_path), command, rounds=20, epoch=2)
    wanted = resume_command.replace("{}", str(tmp_path))
    assert line == f"tiny (independent): stopped at round 20 of 40; continue with: {wanted}"


def test_a_run_without_a_server_is_not_taken_for_a_stopped_one(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.hold():
        line = left_by(folder, [], rounds=20, epoch=2)
    assert line == "tiny (independent): under way without a server, at round 20 of 40 when it last reported"


def test_a_folder_with_a_server_and_an_empty_one_have_no_description(tmp_path: Path) -> None:
    assert describe_recorded(RunFolder(tmp_path)) is None
    left_by(RunFolder(tmp_path), [], rounds=20, epoch=2)
    with (tmp_path / "server.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert describe_recorded(RunFolder(tmp_path)) is None
