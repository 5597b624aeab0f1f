"""How a Ray cluster is shown its token, and what is said of one that cannot be used."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from codistill.process.exit_codes import ExitCode
from codistill_deploy.errors import CommandError
from codistill_deploy.launch.ray.connection import MODE, TOKEN, TOKEN_PATH, connected, credentials


def test_the_token_is_found_as_ray_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text("from-a-file\n")
    assert credentials({}) == credentials({MODE: "disabled", TOKEN: "t"}) == ()
    shown = credentials({MODE: "token", TOKEN: "t", TOKEN_PATH: str(file)})
    assert shown == (("authorization", "Bearer t"),)
    assert credentials({MODE: "token", TOKEN_PATH: str(file)}) == (("authorization", "Bearer from-a-file"),)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("from-home")
    assert credentials({MODE: "token"}) == (("authorization", "Bearer from-home"),)


def test_a_token_that_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(
        CommandError, match=r"RAY_AUTH_MODE is token, and RAY_AUTH_TOKEN is not set and .* cannot be read"
    ):
        credentials({MODE: "token", TOKEN_PATH: str(tmp_path / "nothing")})


def test_a_client_s_address_is_none() -> None:
    with pytest.raises(CommandError, match="submit a job: ray job submit"), connected("ray://head:10001", 1):
        pass


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MODE, raising=False)
    refused = pytest.raises(CommandError, match=r"no Ray cluster answers at 127\.0\.0\.1:1; ")
    with refused as caught, connected("127.0.0.1:1", 1):
        pass
    assert caught.value.code is ExitCode.UNREACHABLE


def test_a_checkout_without_ray_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ray").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    with pytest.raises(CommandError, match=r"pip install 'codistill\[ray\]'"), connected("auto", 1):
        pass
    sys.modules.pop("ray", None)
