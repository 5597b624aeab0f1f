"""torchvision is imported by a user's module, first and beside any build of torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def run(program: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_users_module_may_be_the_first_to_import_it(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torchvision\nfrom torchvision.transforms import v2\ndef net(): return 3\n"
    )
    program = "from codistill.process.plugins import load; print(load('mine:net', 'model')())"
    assert run(program, tmp_path) == "3\n"


def test_a_peer_s_own_program_may_too(tmp_path: Path) -> None:
    program = """
import codistill.peer.grpc
from codistill.process.torchvision_operators import declare_missing_operators
declare_missing_operators()
declare_missing_operators()
import sys
assert "torchvision" not in sys.modules, "that takes seconds"
import torchvision
print(torchvision.models.resnet18(num_classes=3).fc.out_features)
"""
    assert run(program, tmp_path) == "3\n"


@pytest.mark.parametrize("library", ["", "not a library"])
def test_operators_are_declared_where_the_compiled_ones_do_not_load(library: str, tmp_path: Path) -> None:
    """Stand-in packages show every build of torchvision: without a library, and with one that does not load."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import torch\ntorch.library.register_fake('torchvision::nms')(lambda *_: None)\n"
    )
    if library:
        (package / "_C.so").write_text(library)
    program = (
        "from codistill.process.torchvision_operators import declare_missing_operators as d; d(); import torchvision"
    )
    run(program, tmp_path)


def test_nothing_is_imported_where_torchvision_is_not_installed(tmp_path: Path) -> None:
    program = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torchvision" else find(name, *rest)
from codistill.process.torchvision_operators import declare_missing_operators
declare_missing_operators()
print("torch" in sys.modules)
"""
    assert run(program, tmp_path) == "False\n"
