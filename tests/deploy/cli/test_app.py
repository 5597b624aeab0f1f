from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from codistill.process.plugins import LoadError
from codistill_deploy.cli.app import app
from codistill_deploy.cli.process_setup import refusing_exit


def test_a_signal_while_the_process_ends_changes_nothing() -> None:
    program = textwrap.dedent("""
        import atexit, os, signal
        from codistill_deploy.cli import app as cli
        from codistill_deploy.cli.process_setup import stop_on_signals

        def interrupt():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)

        def command(**options):
            stop_on_signals().set()
            atexit.register(interrupt)
            raise SystemExit(7)

        cli.app = command
        cli.main()
    """)
    ended = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (7, "")


def test_grpc_is_not_imported_before_its_verbosity_is_set() -> None:
    program = "import sys, codistill_deploy.cli.app; sys.exit('grpc' in sys.modules)"
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
    ended = run_without(missing, [command, str(path), *options], tmp_path)
    assert ended.returncode == 3, ended.stderr
    assert said in ended.stderr


def run_without(missing: list[str], arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    program = textwrap.dedent(f"""
        import sys
        sys.modules.update(dict.fromkeys({missing!r}))
        sys.argv = ["codistill", *{arguments!r}]
        from codistill_deploy.cli.app import main
        main()
    """)
    return subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, cwd=cwd)


def test_a_server_is_looked_for_in_a_folder_without_the_server_s_packages(tmp_path: Path) -> None:
    ended = run_without(ONE_SIDE["work"][1], ["status", "--run-dir", str(tmp_path)], tmp_path)
    assert ended.returncode == 5, ended.stderr
    assert "no server runs in" in ended.stderr


def test_a_command_whose_part_is_not_installed_says_which(tmp_path: Path) -> None:
    (tmp_path / "students" / "a").mkdir(parents=True)
    ended = run_without(ONE_SIDE["serve"][1], ["export", str(tmp_path), "--student", "a"], tmp_path)
    assert ended.returncode == 3, ended.stderr
    assert ended.stderr == (
        "error: safetensors is not installed, which codistill's worker needs; install it with: pip install "
        "'codistill[worker]'\n"
    )


@pytest.mark.parametrize("arguments", [["serve", "missing.yaml"], ["work", "missing.yaml", "--student", "a"]])
def test_a_child_follows_its_parent_before_anything_that_may_take_long(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class FollowedError(Exception):
        pass

    def follow(stop: threading.Event) -> None:
        assert not stop.is_set()
        raise FollowedError

    monkeypatch.setattr(f"codistill_deploy.cli.{arguments[0]}.exit_with_parent", follow)
    assert isinstance(CliRunner().invoke(app, arguments).exception, FollowedError)


def test_a_module_of_the_working_folder_is_not_loaded(tmp_path: Path) -> None:
    for name in ("typer", "yaml", "codistill", "pydantic"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('it was loaded')\n")
    command = [sys.executable, "-m", "codistill_deploy", "--version"]
    ended = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_an_end_of_the_process_inside_a_command_is_an_error() -> None:
    def leave() -> None:
        sys.exit(0)

    with pytest.raises(LoadError, match=r"^the experiment's own code: it ended the process \(SystemExit: 0 at "):
        refusing_exit(leave)()


def test_what_is_no_exception_is_an_error_of_the_users_code_in_any_command() -> None:
    def leave() -> None:
        raise GeneratorExit("mine")

    with pytest.raises(LoadError, match=r"^the experiment's own code: GeneratorExit at .*test_app\.py:\d+: mine$"):
        refusing_exit(leave)()


def run_own_model(folder: Path, source: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a student whose model is `source`'s `net`, from the folder and with relative paths."""
    (folder / "own.py").write_text(source)
    (folder / "e.yaml").write_text(
        "name: e\ndata: {dataset: digits, train_size: 20, test_size: 10}\ntraining: {epochs: 1, batch_size: 20}\n"
        "distillation: {method: independent}\nstudents: [{name: a, model: 'own:net'}]\n"
    )
    command = [sys.executable, "-m", "codistill_deploy", "run", "e.yaml", "--run-dir", "r", *options]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)


NET = """
import os
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, channels, size):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, classes))

    def forward(self, images):
        os.chdir("/")
        return self.body(images)

def net(classes, channels, size):
    os.chdir("/tmp")
    return Net(classes, channels, size)

os.chdir("/usr")
"""


def test_a_command_is_recorded_as_given_and_keeps_its_paths_where_code_changes_the_working_folder(
    tmp_path: Path,
) -> None:
    ended = run_own_model(tmp_path, NET, "--in-process")
    assert f"report: {tmp_path}/r/report.html" in ended.stdout
    assert (tmp_path / "r" / "students" / "a" / "checkpoint.safetensors").exists()
    run_own_model(tmp_path, NET, "--in-process", "--resume")
    about = json.loads((tmp_path / "r" / "run.json").read_text())
    given = ["codistill", "run", "e.yaml", "--run-dir", "r", "--in-process"]
    assert about["command"] == given
    assert [start["command"] for start in about["resumed"]] == [[*given, "--resume"]]
    assert yaml.safe_load((tmp_path / "r" / "experiment.yaml").read_text())["data"]["root"] == f"{tmp_path}/data"
