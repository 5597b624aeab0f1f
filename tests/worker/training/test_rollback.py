"""The changes of a forward pass are put back, without new copies at each step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from codistill_worker.training.rollback import Rollback


class Counting(nn.Module):
    """Keeps a count in an extra state, and puts a new tensor in the place of its buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.count = [0]
        self.register_buffer("mean", torch.zeros(2, dtype=torch.float64))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.count[0] += 1
        self.mean = self.mean + 1
        return images

    def get_extra_state(self) -> Any:
        return {"count": self.count}

    def set_extra_state(self, state: Any) -> None:
        self.count = state["count"]


def values(model: nn.Module) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


def test_what_a_forward_pass_changes_is_put_back_at_every_step() -> None:
    counting = Counting()
    model = nn.Sequential(nn.BatchNorm1d(2), counting)  # buffers of three kinds: float32, int64, float64
    rollback = Rollback(model)
    for step in range(3):
        before = values(model)
        rollback.keep()
        for _ in range(2):  # abandoned twice
            model(torch.randn(4, 2))
            assert not any(map(torch.equal, values(model), before))
            rollback.restore()
            assert all(map(torch.equal, values(model), before))
            assert counting.count == [step]
        model(torch.randn(4, 2))


def test_the_copies_are_made_once() -> None:
    model = nn.BatchNorm1d(2)
    rollback = Rollback(model)
    rollback.keep()
    places = [copied.data_ptr() for copied in rollback._copies]
    model(torch.randn(4, 2))
    rollback.keep()
    assert [copied.data_ptr() for copied in rollback._copies] == places
    assert all(map(torch.equal, rollback._copies, model.buffers()))


def test_a_buffer_that_another_kind_replaced_is_copied_anew() -> None:
    model = nn.Module()
    model.register_buffer("seen", torch.zeros(2))
    rollback = Rollback(model)
    for replaced in (torch.ones(3), torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.int64) * 2):
        rollback.keep()
        model.seen = replaced
        rollback.keep()
        model.seen += 5
        rollback.restore()
        assert torch.equal(model.seen, rollback._copies[0])
        assert model.seen.dtype == replaced.dtype
        assert model.seen.min() < 3


def test_a_model_without_buffers_keeps_nothing() -> None:
    rollback = Rollback(nn.Linear(2, 2))
    rollback.keep()
    rollback.restore()
