"""What is said of an installation that lacks a part."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from codistill_deploy.errors import lacking

PROJECT = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("extra", ["server", "worker"])
def test_what_each_extra_brings_is_named_with_it(extra: str) -> None:
    wanted = {re.split(r"[^\w-]", each)[0].replace("_", "-") for each in PROJECT["optional-dependencies"][extra]}
    modules = {
        module
        for module, distributions in packages_distributions().items()
        if not module.startswith("_") and wanted & {each.lower().replace("_", "-") for each in distributions}
    }
    assert len(modules) >= len(wanted)
    for module in modules:
        found = lacking(ModuleNotFoundError(name=f"{module}.inner"))
        assert found is not None, module
        assert str(found).endswith(f"({module}); install it with: pip install 'codistill[{extra}]'")


def test_another_module_is_none_of_ours() -> None:
    assert lacking(ModuleNotFoundError(name="my_models")) is None
    assert lacking(ModuleNotFoundError("of nobody")) is None
