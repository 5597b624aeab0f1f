"""The token that a Ray cluster is sent, and the errors of one that cannot be used."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from codistill.process.exit_codes import ExitCode
from codistill_deploy.errors import CommandError
from codistill_deploy.launch.ray.connection import (
    AUTH_MODE,
    AUTH_TOKEN,
    AUTH_TOKEN_PATH,
    _job_config,
    connect,
    token_metadata,
)


def test_the_token_is_found_as_ray_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text("from-a-file\n")
    assert token_metadata({}) == token_metadata({AUTH_MODE: "disabled", AUTH_TOKEN: "t"}) == ()
    shown = token_metadata({AUTH_MODE: "token", AUTH_TOKEN: "t", AUTH_TOKEN_PATH: str(file)})
    assert shown == (("authorization", "Bearer t"),)
    assert token_metadata({AUTH_MODE: "token", AUTH_TOKEN_PATH: str(file)}) == (
        ("authorization", "Bearer from-a-file"),
    )
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("from-home")
    assert token_metadata({AUTH_MODE: "token"}) == (("authorization", "Bearer from-home"),)


def test_a_token_that_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(
        CommandError, match=r"RAY_AUTH_MODE is token, and RAY_AUTH_TOKEN is not set and .* cannot be read"
    ):
        token_metadata({AUTH_MODE: "token", AUTH_TOKEN_PATH: str(tmp_path / "nothing")})


def test_a_client_s_address_is_none() -> None:
    with pytest.raises(CommandError, match="submit a job: ray job submit"), connect("ray://head:10001", 1):
        pass


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(AUTH_MODE, raising=False)
    refused = pytest.raises(CommandError, match=r"no Ray cluster answers at 127\.0\.0\.1:1; ")
    with refused as caught, connect("127.0.0.1:1", 1):
        pass
    assert caught.value.code is ExitCode.UNREACHABLE


def test_a_checkout_without_ray_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ray").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    with pytest.raises(CommandError, match=r"pip install 'codistill\[ray\]'"), connect("auto", 1):
        pass
    sys.modules.pop("ray", None)


def test_actors_do_not_take_modules_from_the_working_folder() -> None:
    ray = pytest.importorskip("ray")
    config = _job_config(ray)
    config._py_driver_sys_path.extend(["/a/working/folder"])  # as ray.init does
    assert list(config._get_proto_job_config().py_driver_sys_path) == []
