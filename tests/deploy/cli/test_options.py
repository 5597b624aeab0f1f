"""The options of TLS and the token, which several commands share."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from codistill.wire.security_settings import TLS_CA, TLS_CERT, TLS_KEY, TOKEN_FILE, TOKEN_VARIABLE
from codistill_deploy.cli.app import app
from codistill_deploy.cli.options import SecurityFiles, whole_path, with_security_options


@pytest.mark.parametrize("command", ["run", "ray", "serve", "work", "status", "health"])
def test_each_setting_is_an_option_and_a_variable_of_each_command_that_uses_the_wire(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    text = " ".join(shown.output.split()).lower()
    for setting in (TLS_CERT, TLS_KEY, TLS_CA, TOKEN_FILE):
        assert re.search(rf"{setting.option} <?path>? .*?{setting.variable.lower()}\b", text)
    assert TOKEN_VARIABLE.lower() in text
    assert "--token " not in text, "a token on a command line is read by everybody on the machine"


def test_the_options_reach_the_command_as_one_value() -> None:
    received: list[tuple[int, SecurityFiles, str]] = []

    @with_security_options
    def command(number: int, *, security_files: SecurityFiles, last: str = "z") -> None:
        received.append((number, security_files, last))

    one = typer.Typer()
    one.command()(command)
    options = ["--tls-cert", "c", "--tls-key", "k", "--tls-ca", "a", "--token-file", "t", "--last", "y"]
    assert CliRunner().invoke(one, ["7", *options]).exit_code == 0
    assert CliRunner().invoke(one, ["8"]).exit_code == 0
    assert received == [(7, SecurityFiles(Path("c"), Path("k"), Path("a"), Path("t")), "y"), (8, SecurityFiles(), "z")]


def test_a_runs_own_token_serves_where_no_other_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    monkeypatch.delenv(TOKEN_FILE.variable, raising=False)
    assert SecurityFiles().read(tmp_path).token is None, "no run is going on there"
    (tmp_path / "run.token").write_text("the token of the run\n".replace(" ", "-"))
    (tmp_path / "run.token").chmod(0o600)
    assert SecurityFiles().read().token is None
    found = SecurityFiles().read(tmp_path).token
    assert found is not None
    assert found.plain == "the-token-of-the-run"
    monkeypatch.setenv(TOKEN_VARIABLE, "a-token-of-the-environment")
    found = SecurityFiles().read(tmp_path).token
    assert found is not None
    assert found.plain == "a-token-of-the-environment"


def test_a_path_is_whole_wherever_a_command_takes_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    paths = 0
    for registered in app.registered_commands:
        assert registered.callback is not None
        for parameter in inspect.signature(registered.callback, eval_str=True).parameters.values():
            if "Path" in str(parameter.annotation):
                (settings,) = parameter.annotation.__metadata__
                assert settings.parser is whole_path, f"{registered.callback.__name__}: {parameter.name}"
                paths += 1
    assert paths > 30


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "~/e.yaml"],
        ["run", "e.yaml", "--run-dir=~/x"],
        ["run", "e.yaml", "--run-dir", "~"],
        ["serve", "e.yaml", "--tls-cert", "~/c"],
        ["report", "~/x"],
        ["export", "x", "--student", "a", "--out", "~/y"],
        ["status", "--run-dir", ""],
    ],
)
def test_a_path_that_only_a_shell_expands_is_refused_with_the_whole_one(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    ended = CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})
    assert ended.exit_code == 2
    if arguments[-1]:
        assert re.search(r"write the whole path, /home/me[/\w.]*, or \./~", ended.output), ended.output
    else:
        assert "'--run-dir': the path is empty; name one, or leave the option out" in ended.output


def test_a_folder_named_so_is_reached_by_the_way_that_the_error_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert whole_path("./~/x") == tmp_path / "~" / "x", "as text it passes for a path in a child's command line too"
    assert whole_path("a/~/x") == Path("a/~/x")
