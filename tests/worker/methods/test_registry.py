"""Every method of the experiment file has a module of its name, found without a list."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from typing import Any

import pytest
from torch import nn

from codistill.config.methods import METHODS, Independent, Kd
from codistill.methods import Logits, StudentContext
from codistill_worker import methods
from codistill_worker.methods import create, teacher_network

NAMES = list(METHODS)


def context() -> StudentContext:
    return StudentContext("a", nn.Identity(), {"classes": 3, "channels": 1, "size": 8}, dict)


@pytest.mark.parametrize("name", NAMES)
def test_every_method_has_a_module_with_an_objective(name: str) -> None:
    module = importlib.import_module(f"codistill_worker.methods.{name}")
    assert callable(module.objective)


def test_every_module_with_an_objective_is_a_method() -> None:
    """A file whose method was forgotten in the settings could never be chosen."""
    names = [module.name for module in pkgutil.iter_modules(methods.__path__)]
    modules = {name: importlib.import_module(f"codistill_worker.methods.{name}") for name in names}
    assert {name for name, module in modules.items() if hasattr(module, "objective")} == set(NAMES)


def test_the_method_names_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr("codistill_worker.methods.kd.objective", lambda *arguments: made.append(arguments))
    student, settings = context(), Kd()
    create(settings, student)
    assert made == [(settings, student)]


def test_a_teacher_publishes_its_logits_unless_the_method_says_otherwise() -> None:
    assert isinstance(teacher_network(Independent(), context()), Logits)


def test_methods_load_without_torchvision_timm_and_scikit_learn() -> None:
    """A peer with a training loop of its own installs none of them."""
    program = f"""
import importlib, sys
sys.modules.update(dict.fromkeys(("torchvision", "timm", "sklearn"), None))  # an import of them fails
import torch
from codistill.config.methods import Kd
from codistill.methods import Step, StudentContext
from codistill_worker.methods import create, losses
for name in {NAMES!r}:
    importlib.import_module("codistill_worker.methods." + name)
student = StudentContext("a", torch.nn.Identity(), dict(classes=3, channels=1, size=8), dict)
logits = torch.zeros(2, 3, requires_grad=True)
labels = torch.tensor([0, 1])
loss = create(Kd(), student).loss(Step(dict(logits=logits), labels, dict(logits=torch.ones(2, 3))))
loss.total.backward()
assert losses.cross_entropy(logits, labels).isfinite()
print("loaded")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout == "loaded\n", done.stderr
