"""What `codistill status` and the live view ask of a server, protected or not, and what is added to its answer."""

from __future__ import annotations

import contextlib
import fcntl
import io
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from rich.console import Console

from codistill.config.experiment import parse
from codistill.process.exit_codes import ExitCode
from codistill.rundir.info import RunInfo
from codistill.rundir.layout import RunLayout
from codistill.rundir.records import Happened, Joined, Measured
from codistill.v1 import distillation_pb2 as pb
from codistill.v1.distillation_pb2_grpc import DistillationServicer, add_DistillationServicer_to_server
from codistill.wire.security import Security
from codistill_deploy.cli.status import add_supervisor_events, fetch_status, print_status, recorded
from codistill_deploy.errors import CommandError
from codistill_deploy.run_folder import RunFolder
from codistill_deploy.supervise.supervisor import watch
from support_certificates import TOKEN, Certificates


class Server(DistillationServicer):
    """Answers the token that it wants, and ends every other call with a code."""

    def __init__(self, code: grpc.StatusCode = grpc.StatusCode.UNAUTHENTICATED) -> None:
        self.code = code
        self.refused = threading.Event()

    def _check(self, context: Any) -> None:
        if dict(context.invocation_metadata()).get("authorization") != f"Bearer {TOKEN}":
            self.refused.set()
            context.abort(self.code, "not you;\n  give something else")

    def GetRun(self, request: pb.GetRunRequest, context: Any) -> pb.Run:  # noqa: N802 - gRPC's name
        self._check(context)
        return pb.Run(name="small")

    def WatchRun(self, request: pb.WatchRunRequest, context: Any) -> Generator[pb.Run]:  # noqa: N802 - gRPC's name
        self._check(context)
        yield pb.Run(name="small", complete=True)


@contextlib.contextmanager
def serving(servicer: Server, security: Security) -> Generator[str]:
    server = grpc.server(ThreadPoolExecutor(2))
    add_DistillationServicer_to_server(servicer, server)
    credentials = security.server_credentials()
    assert credentials is not None
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def test_with_the_token_it_is_answered(certificates: Certificates) -> None:
    with serving(Server(), certificates.of("server", "ca")) as address:
        assert fetch_status(address, certificates.of("worker", "ca", TOKEN)).name == "small"


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED])
def test_a_refusal_is_one_line_and_a_code_of_its_own(code: grpc.StatusCode, certificates: Certificates) -> None:
    with serving(Server(code), certificates.of("server")) as address, pytest.raises(CommandError) as caught:
        fetch_status(address, certificates.of(None, "ca"))
    assert str(caught.value) == f"server {address} refused: not you; give something else"
    assert caught.value.code is ExitCode.REFUSED


def test_a_handshake_that_fails_is_explained(certificates: Certificates) -> None:
    wants = "it asks for a client's certificate"
    protected = serving(Server(), certificates.of("server", "ca"))
    with protected as address, pytest.raises(CommandError, match=wants) as caught:
        fetch_status(address, certificates.of(None, "ca", TOKEN))
    assert caught.value.code is ExitCode.REFUSED


def test_the_live_view_shows_the_token_too(certificates: Certificates) -> None:
    seen: list[pb.Run] = []
    with serving(Server(), certificates.of("server", "ca")) as address:
        watch(lambda: address, seen.append, threading.Event(), certificates.of("worker", "ca", TOKEN), interval=0.1)
    assert [run.name for run in seen] == ["small"]


def test_a_live_view_that_is_refused_shows_nothing_and_ends_when_told(certificates: Certificates) -> None:
    seen: list[pb.Run] = []
    servicer, over = Server(), threading.Event()
    with serving(servicer, certificates.of("server")) as address:
        arguments = (lambda: address, seen.append, over, certificates.of(None, "ca"), 0.1)
        watching = threading.Thread(target=watch, args=arguments)
        watching.start()
        assert servicer.refused.wait(30)
        over.set()
        watching.join(30)
        assert not watching.is_alive()
    assert seen == []


def state() -> pb.Run:
    events = [pb.Event(unix_seconds=time, kind="joined", student="cnn", message="joined") for time in (1, 3)]
    return pb.Run(name="digits", method="kdcl", frontier=3, events=events)


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
def test_an_event_is_told_by_its_kind(kind: str, student: str, message: str, line: str) -> None:
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


def test_restarts_stand_among_the_servers_events(tmp_path: Path) -> None:
    happened = Happened(time=2, what="restarted", student="cnn", message="was killed by SIGKILL; started again")
    (RunLayout(tmp_path).supervisor_file).write_text(happened.model_dump_json() + "\n")
    run = state()
    add_supervisor_events(run, RunLayout(tmp_path))
    assert [event.kind for event in run.events] == ["joined", "restarted", "joined"]
    assert "cnn restarted: was killed by SIGKILL; started again" in shown(run)


def test_a_run_without_a_supervisor_has_the_servers_events_alone(tmp_path: Path) -> None:
    run = state()
    add_supervisor_events(run, RunLayout(tmp_path))
    assert run == state()


def test_a_file_that_is_none_of_ours_is_named(tmp_path: Path) -> None:
    (RunLayout(tmp_path).supervisor_file).write_text("nonsense\n")
    with pytest.raises(CommandError, match=r"supervisor\.jsonl.*line 1"):
        add_supervisor_events(state(), RunLayout(tmp_path))


def left_by(folder: RunFolder, command: list[str], *, rounds: int, epoch: float) -> str:
    """Returns what is told of a run that got so far and whose server is gone."""
    experiment = parse(
        "name: tiny\ndata: {dataset: digits}\ntraining: {epochs: 4}\n"
        "distillation: {method: independent}\nstudents: [{name: a, model: mlp}]\n"
    )
    folder.join(experiment)
    (folder.path / "run.json").write_text(RunInfo(command=tuple(command)).model_dump_json())
    done = {"student": "a", "split": "test", "round": rounds, "epoch": epoch, "accuracy": 0.9, "loss": 0.1}
    records = (
        Joined(time=0, student="a", model="mlp", parameters=1, device="cpu", total_rounds=40),
        Measured.model_validate({"time": 1, **done}),
    )
    folder.metrics_file.write_text("".join(f"{record.model_dump_json()}\n" for record in records))
    line = recorded(folder)
    assert line is not None
    return line


def test_a_run_that_is_over_is_told_from_its_records(tmp_path: Path) -> None:
    line = left_by(RunFolder(tmp_path), ["codistill", "run", "my run.yaml"], rounds=40, epoch=4)
    assert line == "tiny (independent): complete at round 40"


@pytest.mark.parametrize(
    ("command", "again"),
    [
        (["codistill", "run", "my run.yaml"], "codistill run 'my run.yaml' --run-dir {} --resume"),
        (["codistill", "run", "a.yaml", "--run-dir=b", "--resume"], "codistill run a.yaml --run-dir=b --resume"),
        (["codistill", "serve", "a.yaml"], "codistill serve a.yaml --run-dir {}"),
        (["codistill", "compare", "a.yaml"], "codistill run {}/experiment.yaml --run-dir {} --resume"),
    ],
)
def test_a_run_that_was_stopped_is_told_with_how_to_go_on(command: list[str], again: str, tmp_path: Path) -> None:
    line = left_by(RunFolder(tmp_path), command, rounds=20, epoch=2)
    wanted = again.replace("{}", str(tmp_path))
    assert line == f"tiny (independent): stopped at round 20 of 40; go on with: {wanted}"


def test_a_run_without_a_server_is_not_taken_for_a_stopped_one(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.hold():
        line = left_by(folder, [], rounds=20, epoch=2)
    assert line == "tiny (independent): under way without a server, at round 20 of 40 when it last reported"


def test_a_server_at_work_is_asked_and_an_empty_folder_tells_nothing(tmp_path: Path) -> None:
    assert recorded(RunFolder(tmp_path)) is None
    left_by(RunFolder(tmp_path), [], rounds=20, epoch=2)
    with (tmp_path / "server.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert recorded(RunFolder(tmp_path)) is None
