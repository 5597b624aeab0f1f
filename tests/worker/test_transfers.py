"""Copies between host and device: page-locked for a CUDA device that is in use, and what is not finite is found."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from codistill_worker.transfers import all_finite, host_buffer, upload

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("device", "initialised", "pinned"),
    [(CPU, False, False), (CPU, True, False), (CUDA, False, False), (CUDA, True, True)],
)
def test_memory_is_page_locked_only_where_cuda_is_in_use(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, initialised: bool, pinned: bool
) -> None:
    asked: list[bool] = []

    def empty(shape: Any, *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        asked.append(pin_memory)
        return torch.zeros(shape, dtype=dtype)

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialised)
    monkeypatch.setattr(torch, "empty", empty)
    buffer = host_buffer((2, 3), torch.uint8, device)
    assert (buffer.shape, buffer.dtype) == ((2, 3), torch.uint8)
    assert asked == [pinned]


class Staged:
    """Stands for a page-locked tensor."""

    def __init__(self) -> None:
        self.holds: torch.Tensor | None = None
        self.copies: list[tuple[torch.device, bool]] = []

    def copy_(self, values: torch.Tensor) -> Staged:
        self.holds = values
        return self

    def is_pinned(self) -> bool:
        return True

    def to(self, device: torch.device, *, non_blocking: bool) -> Staged:
        self.copies.append((device, non_blocking))
        return self


class Pageable:
    """Stands for a tensor in pageable memory."""

    shape, dtype = torch.Size([3]), torch.int64

    def is_pinned(self) -> bool:
        return False

    def to(self, *_: Any, **__: Any) -> None:
        raise AssertionError("a copy from pageable memory waits for the device")


def test_an_upload_to_cuda_never_copies_from_pageable_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    staged, pageable = Staged(), Pageable()
    monkeypatch.setattr("codistill_worker.transfers.host_buffer", lambda *_: staged)
    upload(pageable, CUDA)  # pyright: ignore[reportArgumentType]
    assert staged.holds is pageable
    assert staged.copies == [(CUDA, True)]
    already = Staged()
    upload(already, CUDA)  # pyright: ignore[reportArgumentType]
    assert already.holds is None
    assert already.copies == [(CUDA, True)]


def test_an_upload_to_the_cpu_is_the_tensor_itself() -> None:
    values = torch.arange(3)
    assert upload(values, CPU) is values


@pytest.mark.parametrize("size", [1, 7, 4096])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_found_wherever_it_is(size: int, bad: float) -> None:
    values = torch.linspace(-1e30, 1e30, size).view(-1, 1)
    assert all_finite(values)
    for place in {0, size // 2, size - 1}:
        spoiled = values.clone()
        spoiled[place] = bad
        assert not all_finite(spoiled)


def test_nothing_is_finite() -> None:
    assert all_finite(torch.zeros(3, 0))
