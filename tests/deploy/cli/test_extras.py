"""The errors without an extra."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from codistill.process.exit_codes import ExitCode
from codistill_deploy.cli.app import _print_error
from codistill_deploy.cli.extras import _EXTRAS, describe_missing

ROOT = Path(__file__).resolve().parents[3]


def test_every_package_of_the_extras_is_known_by_the_name_that_is_imported() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    installed = packages_distributions()
    for extra in ("server", "worker"):
        wanted = {re.split(r"[<>=\[]", each)[0] for each in declared[extra]}
        known = {installed[module][0].lower().replace("_", "-") for module, of in _EXTRAS.items() if of == extra}
        assert known == wanted


def test_a_server_without_its_extra_ends_with_a_line_that_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "grpc_reflection.v1alpha", None)
    for module in ("codistill_server.app", "codistill_server.rpc.server"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ModuleNotFoundError) as raised:
        import codistill_server.app  # noqa: F401
    assert _print_error(raised.value) is ExitCode.CONFIGURATION
    assert capsys.readouterr().err == (
        "error: grpc_reflection is not installed, which codistill's server needs; "
        "install it with: pip install 'codistill[server]'\n"
    )


@pytest.mark.parametrize("error", [ModuleNotFoundError("no", name="mine"), ModuleNotFoundError(), ValueError("no")])
def test_what_no_extra_brings_is_no_matter_of_extras(error: Exception) -> None:
    assert describe_missing(error) is None
