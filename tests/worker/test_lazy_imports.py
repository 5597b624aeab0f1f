"""torchvision and timm import beside any build of torch."""

from __future__ import annotations

import subprocess
import sys


def test_both_import_even_after_an_import_that_failed() -> None:
    program = """
import warnings
warnings.simplefilter("error")
try:
    import torchvision  # fails beside a CPU build of torch, and leaves halves of itself behind
except RuntimeError:
    pass
from codistill_worker import lazy_imports
module = lazy_imports.torchvision()
assert module is lazy_imports.torchvision()
assert module.models.get_model("squeezenet1_1", weights=None, num_classes=3)
assert lazy_imports.timm().is_model("resnet18")
import torchvision
assert torchvision is module
print("both")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout == "both\n", done.stderr
