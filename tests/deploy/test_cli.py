from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from codistill.exit_codes import ExitCode
from codistill.experiment import Experiment, parse
from codistill.security import TLS_CA, TLS_CERT, TLS_KEY, TOKEN_FILE, TOKEN_VARIABLE
from codistill_deploy import cli
from codistill_deploy.cli import app
from codistill_deploy.errors import CommandError
from codistill_deploy.run_folder import RunFolder
from codistill_deploy.views import View


@pytest.mark.parametrize("command", ["run", "serve", "work", "status", "health"])
def test_what_protects_the_wire_is_an_option_and_a_variable_of_each_command_that_uses_it(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    text = " ".join(shown.output.split()).lower()
    for setting in (TLS_CERT, TLS_KEY, TLS_CA, TOKEN_FILE):
        assert re.search(rf"{setting.option} <?path>? .*?{setting.variable.lower()}\b", text)
    assert TOKEN_VARIABLE.lower() in text
    assert "--token " not in text, "a token on a command line is read by everybody on the machine"


def test_a_signal_while_the_process_ends_changes_nothing() -> None:
    program = textwrap.dedent("""
        import atexit, os, signal
        from codistill_deploy import cli

        def interrupt():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)

        def command(**options):
            cli._stop_on_signals().set()
            atexit.register(interrupt)
            raise SystemExit(7)

        cli.app = command
        cli.main()
    """)
    ended = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (7, "")


def test_grpc_is_not_imported_before_it_is_told_to_be_quiet() -> None:
    program = "import sys, codistill_deploy.cli; sys.exit('grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


ONE_SIDE = {
    "serve": (
        ["--listen", "0.0.0.0:50551"],
        ["torchvision", "timm", "sklearn", "PIL", "safetensors", "ray"],
        "nothing protects the port",
    ),
    "work": (
        ["--server", "127.0.0.1:1", "--student", "nobody"],
        ["prometheus_client", "grpc_reflection", "ray"],
        "'nobody' is not one of the experiment's",
    ),
}


@pytest.mark.parametrize("command", ONE_SIDE)
def test_each_side_runs_with_its_own_extra_alone(command: str, tmp_path: Path) -> None:
    options, missing, said = ONE_SIDE[command]
    students = [{"name": name, "model": "mlp"} for name in ("a", "b")]
    experiment = {"name": "x", "data": {"dataset": "digits"}, "training": {"epochs": 1}, "students": students}
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(experiment))
    program = textwrap.dedent(f"""
        import sys
        sys.modules.update(dict.fromkeys({missing!r}))
        sys.argv = ["codistill", {command!r}, {str(path)!r}, *{options!r}]
        from codistill_deploy.cli import main
        main()
    """)
    ended = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 3, ended.stderr
    assert said in ended.stderr


class TestReport:
    """The report of a run says how the run ended; it never decides that."""

    @pytest.fixture
    def experiment(self, tmp_path: Path) -> Experiment:
        students = [{"name": "mlp", "model": "mlp"}]
        document = {"name": "x", "data": {"dataset": "digits"}, "training": {"epochs": 1}, "students": students}
        document["distillation"] = {"method": "independent"}
        return parse(yaml.safe_dump(document))

    def end(
        self, experiment: Experiment, folder: RunFolder, error: Exception | None = None, metrics: str = ""
    ) -> ExitCode:
        def go(view: View, lock: int) -> ExitCode:
            folder.metrics_file.write_text(metrics)
            if error is not None:
                raise error
            return ExitCode.OK

        return cli._held(experiment, folder, "x", go, mode="grpc", resume=False, report=True)

    def test_of_a_run_that_failed_too(self, experiment: Experiment, tmp_path: Path) -> None:
        folder = RunFolder(tmp_path)
        with pytest.raises(CommandError, match="it died"):
            self.end(experiment, folder, CommandError("it died"))
        assert folder.report.is_file()

    @pytest.mark.parametrize("garbage", [True, False])
    def test_one_that_cannot_be_written_hides_no_error(
        self, experiment: Experiment, tmp_path: Path, caplog: pytest.LogCaptureFixture, garbage: bool
    ) -> None:
        folder = RunFolder(tmp_path)
        if not garbage:
            folder.report.mkdir()
        with pytest.raises(CommandError, match=r"^it died$") as raised:
            self.end(experiment, folder, CommandError("it died", ExitCode.HUNG), "garbage\n{}\n" if garbage else "")
        assert raised.value.code is ExitCode.HUNG
        (line,) = caplog.messages
        assert line.startswith(f"{tmp_path}: no report can be made: ")
        assert line.endswith(f"codistill report {tmp_path}")

    def test_a_complete_run_without_one_is_complete(
        self, experiment: Experiment, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = RunFolder(tmp_path)
        folder.report.mkdir()
        assert self.end(experiment, folder) is ExitCode.OK
        (line,) = caplog.messages
        assert "no report can be made" in line

    @pytest.mark.parametrize("why", ["in use by another run", "already holds a run"])
    def test_a_refused_command_leaves_the_folders_own(
        self, experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
    ) -> None:
        folder = RunFolder(tmp_path)
        folder.start(experiment, mode="grpc", resume=False)
        folder.metrics_file.write_text("")
        folder.report.write_text("the run's own")
        (folder.student("mlp") / "checkpoint.safetensors").write_bytes(b"")
        with contextlib.ExitStack() as stack:
            if why.startswith("in use"):
                stack.enter_context(folder.hold())
                monkeypatch.setattr("codistill_deploy.run_folder._lock", lambda *_: False)
            with pytest.raises(CommandError, match=why):
                self.end(experiment, folder)
        assert folder.report.read_text() == "the run's own"


@pytest.mark.parametrize("arguments", [["serve", "missing.yaml"], ["work", "missing.yaml", "--student", "a"]])
def test_a_child_follows_its_parent_before_anything_that_may_take_long(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class FollowedError(Exception):
        pass

    def follow(stop: threading.Event) -> None:
        assert not stop.is_set()
        raise FollowedError

    monkeypatch.setattr(cli, "follow_parent", follow)
    assert isinstance(CliRunner().invoke(app, arguments).exception, FollowedError)
