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
from codistill_deploy.console.recorded import describe_recorded, supervisor_events
from codistill_deploy.console.status import print_status
from codistill_deploy.errors import CommandError
from codistill_deploy.run_folder import RunFolder


def state() -> pb.Run:
    run = pb.Run(name="digits", method="kdcl", frontier=3)
    for at in (1, 3):
        event = run.events.add(kind=pb.EVENT_KIND_JOINED, participant="cnn", message=f"joined at round {at}")
        event.time.seconds = at
    return run


def test_restarts_stand_among_the_servers_events(tmp_path: Path) -> None:
    happened = Happened(time=2, what="restarted", participant="cnn", message="was killed by SIGKILL; started again")
    RunLayout(tmp_path).supervisor_file.write_text(happened.model_dump_json() + "\n")
    console = Console(file=io.StringIO(), width=80)
    print_status(state(), console, supervisor_events(RunLayout(tmp_path)))
    assert isinstance(console.file, io.StringIO)
    assert [line.partition(" ")[2] for line in console.file.getvalue().splitlines()[-3:]] == [
        "cnn joined at round 1",
        "cnn restarted: was killed by SIGKILL; started again",
        "cnn joined at round 3",
    ]


def test_a_run_without_a_supervisor_has_the_servers_events_alone(tmp_path: Path) -> None:
    assert supervisor_events(RunLayout(tmp_path)) == []


def test_a_file_that_is_none_of_ours_is_named(tmp_path: Path) -> None:
    RunLayout(tmp_path).supervisor_file.write_text("nonsense\n")
    with pytest.raises(CommandError, match=r"supervisor\.jsonl.*line 1"):
        supervisor_events(RunLayout(tmp_path))


def left_by(folder: RunFolder, command: list[str], *, steps: int, epochs: float) -> str:
    """Return the description of a run that got so far and whose server is gone."""
    experiment = parse(
        "name: tiny\ndata: {dataset: digits}\ntraining: {epochs: 4}\n"
        "distillation: {method: independent}\nstudents: [{name: a, model: mlp}]\n"
    )
    folder.join(experiment, supervised=True)
    (folder.path / "run.json").write_text(RunInfo(command=tuple(command)).model_dump_json())
    done = {
        "participant": "a",
        "split": "test",
        "steps_trained": steps,
        "epochs_trained": epochs,
        "accuracy": 0.9,
        "loss": 0.1,
    }
    records = (
        Joined(time=0, participant="a", model="mlp", parameters=1, device="cpu", total_rounds=0, total_steps=40),
        Measured.model_validate({"time": 1, **done}),
    )
    folder.metrics_file.write_text("".join(f"{record.model_dump_json()}\n" for record in records))
    line = describe_recorded(folder)
    assert line is not None
    return line


def test_a_complete_run(tmp_path: Path) -> None:
    line = left_by(RunFolder(tmp_path), ["codistill", "run", "my run.yaml"], steps=40, epochs=4)
    assert line == "tiny (independent): complete at step 40"


def test_a_run_of_peers_that_report_no_tests_is_complete_once_all_have_finished(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert left_by(folder, [], steps=40, epochs=2).startswith("tiny (independent): stopped at step 40 of 40")
    events = [Happened(time=1, what="joined", participant="a"), Happened(time=2, what="complete")]
    folder.events_file.write_text("".join(f"{event.model_dump_json()}\n" for event in events))
    line = describe_recorded(folder)
    assert line == "tiny (independent): complete at step 40"


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
    line = left_by(RunFolder(tmp_path), command, steps=20, epochs=2)
    wanted = resume_command.replace("{}", str(tmp_path))
    assert line == f"tiny (independent): stopped at step 20 of 40; continue with: {wanted}"


def test_a_run_without_a_server_is_not_taken_for_a_stopped_one(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.hold():
        line = left_by(folder, [], steps=20, epochs=2)
    assert line == "tiny (independent): under way without a server, at step 20 of 40 when it last reported"


def test_a_folder_with_a_server_and_an_empty_one_have_no_description(tmp_path: Path) -> None:
    assert describe_recorded(RunFolder(tmp_path)) is None
    left_by(RunFolder(tmp_path), [], steps=20, epochs=2)
    with (tmp_path / "server.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert describe_recorded(RunFolder(tmp_path)) is None
