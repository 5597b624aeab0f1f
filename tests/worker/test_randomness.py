"""torch's generators are seeded for each forward pass."""

from __future__ import annotations

import pytest
import torch

from codistill.peer.draws import derive
from codistill_worker.randomness import seed_forward


def test_the_global_generator_follows_student_and_step() -> None:
    def draw(seed: int, student: str, number: int) -> float:
        seed_forward(seed, student, number)
        return torch.rand(()).item()

    state = torch.get_rng_state()
    try:
        values = {(s, n, r): draw(s, n, r) for s in (0, 1) for n in ("a", "b") for r in (0, 1)}
        assert len(set(values.values())) == 8
        assert draw(0, "a", 0) == values[0, "a", 0]
    finally:
        torch.set_rng_state(state)


def test_cuda_generators_are_seeded_where_cuda_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    generators = (torch.Generator(), torch.Generator())
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    state = torch.get_rng_state()
    try:
        seed_forward(0, "a", 3)
    finally:
        torch.set_rng_state(state)
    assert [each.initial_seed() for each in generators] == [derive(0, "forward", "a", 3)] * 2
