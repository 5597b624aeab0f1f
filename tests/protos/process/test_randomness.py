"""The global generators, from which a user's code draws, are seeded together and put back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from codistill.process import plugins
from codistill.process.randomness import seed_generators, seeded


def draws() -> tuple[float, float, float, float, float]:
    """Return draws from each generator; a normal one may be left over from an earlier pair."""
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    with seeded(0):
        yield


def test_every_generator_follows_the_seed() -> None:
    seed_generators(2**63 - 1)
    first = draws()
    draws()
    seed_generators(2**63 - 1)
    assert draws() == first
    seed_generators(2**63 - 2)
    assert not set(draws()) & set(first)


def test_cuda_generators_are_seeded_where_cuda_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    generators = (torch.Generator(), torch.Generator())
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    seed_generators(3)
    assert [each.initial_seed() for each in generators] == [3, 3]


def test_after_a_block_the_generators_are_as_before() -> None:
    seed_generators(1)
    draws()
    expected = draws()
    seed_generators(1)
    draws()
    with pytest.raises(ZeroDivisionError), seeded(2):
        draws()[0] / 0
    assert draws() == expected


def test_a_module_that_draws_while_it_is_imported_is_the_same_in_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "import random, numpy, torch\nDRAWN = random.random(), numpy.random.rand(), torch.rand(()).item()\ndef drawn(): return DRAWN\n"
    for name in ("drawing_one", "drawing_two"):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    found: list[object] = []
    for name in ("drawing_one", "drawing_two"):
        draws()
        found.append(plugins.load(f"{name}:drawn", "model")())
    assert found[0] == found[1]
