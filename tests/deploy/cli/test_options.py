"""The options of TLS and the token, which several commands share."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from codistill.wire.security_settings import TLS_CA, TLS_CERT, TLS_KEY, TOKEN_FILE, TOKEN_VARIABLE
from codistill_deploy.cli.app import app
from codistill_deploy.cli.options import SecurityFiles, with_security_options


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
