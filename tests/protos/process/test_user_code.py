"""The modules of the user's own that a process has loaded."""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path

import pytest

from codistill.process import user_code


def test_modules_beside_an_experiment_and_what_they_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net_of_mine").mkdir()
    (tmp_path / "net_of_mine" / "__init__.py").write_text("from net_of_mine import layers\n")
    (tmp_path / "net_of_mine" / "layers.py").write_text("width = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("net_of_mine")
    found = user_code.digests()
    assert found["net_of_mine.layers"] == hashlib.sha256(b"width = 1\n").hexdigest()
    assert "net_of_mine" in found
    (tmp_path / "net_of_mine" / "layers.py").write_text("width = 2\n")
    changed = user_code.digests()
    assert {name for name in found if found[name] != changed[name]} == {"net_of_mine.layers"}
    (tmp_path / "net_of_mine" / "layers.py").unlink()
    assert "net_of_mine.layers" not in user_code.digests()


def test_neither_pythons_nor_what_is_installed_nor_codistills() -> None:
    packages = {name.partition(".")[0] for name in user_code.digests()}
    assert not packages & {
        "json",
        "pathlib",
        "pydantic",
        "pytest",
        "codistill",
        "codistill_deploy",
        "__main__",
        "__mp_main__",
    }
