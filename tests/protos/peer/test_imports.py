"""The imports of a training loop that takes part: neither side of codistill, and nothing of vision."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
import textwrap

import codistill.peer

BLOCKED = (
    "codistill_deploy",
    "codistill_server",
    "codistill_worker",
    "PIL",
    "matplotlib",
    "ray",
    "safetensors",
    "sklearn",
    "timm",
    "torchvision",
)

SCRIPT = """
    import importlib, sys

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in {blocked}:
                raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

    sys.meta_path.insert(0, Blocker())
    for module in {modules}:
        importlib.import_module(module)
    print(sorted({blocked} & {{name.partition(".")[0] for name in sys.modules}}))
"""


def test_the_peer_loads_without_worker_server_and_vision() -> None:
    modules = [module.name for module in pkgutil.walk_packages(codistill.peer.__path__, "codistill.peer.")]
    assert {"codistill.peer.base", "codistill.peer.grpc", "codistill.peer.session"} <= set(modules)
    script = textwrap.dedent(SCRIPT).format(blocked=set(BLOCKED), modules=modules)
    loaded = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=90)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout == "[]\n"
