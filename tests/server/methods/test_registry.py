from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from codistill.config.methods import METHODS, Dml, Independent, Kdcl, Method
from codistill.methods.aggregator import RoundInputs
from codistill_server import methods
from server.methods.support import STUDENTS, targets_of

EXCHANGING = [
    Dml(),
    Dml(temperature=3.0),
    Kdcl(ensemble="naive"),
    Kdcl(ensemble="linear"),
    Kdcl(ensemble="min_logit"),
    Kdcl(ensemble="general"),
]


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_every_method_of_the_settings_has_a_module_of_its_name(settings: type[Method]) -> None:
    name = settings.model_fields["method"].default
    path = Path(methods.__file__).parent / f"{name}.py"
    if settings is Independent:
        assert not path.exists(), "it exchanges nothing"
        return
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    (function,) = [each for each in functions if each.name == "aggregator"]
    assert [(each.arg, ast.unparse(each.annotation)) for each in function.args.args if each.annotation] == [
        ("settings", settings.__name__),
        ("students", "Sequence[str]"),
        ("teachers", "Sequence[str]"),
    ]


def test_every_module_with_an_aggregator_is_a_method() -> None:
    """A file whose method was forgotten in the settings could never be chosen."""
    names = [module.name for module in pkgutil.iter_modules(methods.__path__)]
    modules = {name: importlib.import_module(f"codistill_server.methods.{name}") for name in names}
    own = {name: vars(module).get("aggregator") for name, module in modules.items()}
    found = {name for name, each in own.items() if inspect.isfunction(each) and each.__module__.endswith(f".{name}")}
    assert found == METHODS.keys() - {"independent"}


def test_independent_has_no_aggregator() -> None:
    assert methods.create(Independent()) is None


def test_only_linear_is_heavy() -> None:
    heavy = [each for each in EXCHANGING if (aggregator := methods.create(each)) is not None and aggregator.heavy]
    assert heavy == [Kdcl(ensemble="linear")]


@pytest.mark.parametrize("method", EXCHANGING, ids=lambda method: f"{method.title}-{method.temperature}")
def test_students_may_come_in_any_order(method: Dml | Kdcl) -> None:
    logits = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(3))
    labels = [0, 1, 2, 3, 0, 1]
    held_out = torch.randn(3, 9, 4, generator=torch.Generator().manual_seed(4))
    order = [2, 0, 1]

    def of(positions: list[int]) -> dict[str, dict[str, Tensor]]:
        names = tuple(STUDENTS[position] for position in positions)
        what = RoundInputs(
            names,
            {"logits": logits[positions]},
            torch.tensor(labels),
            {"logits": held_out[positions]},
            torch.arange(9) % 4,
        )
        made = targets_of(method, what)
        return {name: dict(made.shared if made.shared is not None else (made.each or {})[name]) for name in names}

    straight, turned = of([0, 1, 2]), of(order)
    for name, arrays in straight.items():
        for key, value in arrays.items():
            one, other = value, turned[name][key]
            if key == "logits":
                one, other = one.softmax(-1), other.softmax(-1)
            torch.testing.assert_close(one, other, atol=2e-3 if method.title == "kdcl/linear" else 1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", EXCHANGING, ids=lambda method: f"{method.title}-{method.temperature}")
@pytest.mark.parametrize("magnitude", [1e4, 1e30])
def test_targets_stay_finite_whatever_is_let_in(method: Dml | Kdcl, magnitude: float) -> None:
    """The coordinator lets in logits up to 1e30, the ensembles' limit."""
    signs = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(5)).sign()
    logits = signs * torch.nextafter(torch.tensor(magnitude), torch.tensor(0.0))
    made = targets_of(method, RoundInputs(STUDENTS, {"logits": logits}, torch.tensor([0, 1, 2, 3, 0, 1])))
    arrays = [made.shared] if made.shared is not None else list((made.each or {}).values())
    assert arrays
    for each in arrays:
        for name, value in each.items():
            assert bool(torch.isfinite(value).all()), name
