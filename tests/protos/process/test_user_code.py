"""The modules of the user's own that a process has loaded."""

from __future__ import annotations

import hashlib
import importlib
import sys
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


@pytest.mark.parametrize(
    "statement",
    [
        "import late_of_mine",
        "from late_of_mine import scale",
        "import importlib; importlib.import_module('late_of_mine')",
        "from importlib import import_module; import_module('late_of_mine')",
        "__import__('late_of_mine')",
        "import between_of_mine",
        "from packed_of_mine.inner import late",
        "import packed_of_mine.inner.late",
    ],
)
def test_what_a_function_imports_later_counts_already(
    statement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    inner = tmp_path / "packed_of_mine" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "packed_of_mine" / "__init__.py").touch()
    (inner / "__init__.py").write_text(
        "def load():\n    from . import late\n    from ..inner.late import late_of_mine\n"
    )
    (inner / "late.py").write_text("import late_of_mine\n")
    (tmp_path / "between_of_mine.py").write_text("def use():\n    from packed_of_mine import inner\n")
    (tmp_path / "late_of_mine.py").write_text("scale = 1\n")
    (tmp_path / "lazy_of_mine.py").write_text(f"def forward():\n    {statement}\n")
    monkeypatch.delitem(sys.modules, "lazy_of_mine", raising=False)
    importlib.import_module("lazy_of_mine")
    assert "late_of_mine" not in sys.modules
    assert user_code.digests()["late_of_mine"] == hashlib.sha256(b"scale = 1\n").hexdigest()


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
