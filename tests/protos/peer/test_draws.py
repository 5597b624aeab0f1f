"""Every draw follows from what names it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from codistill.peer.draws import derive, permutation, uniforms

SEEDS = st.integers(0, 2**63 - 1)
PARTS = st.lists(st.integers(-(2**70), 2**70) | st.text(max_size=8), max_size=4)


def test_derived_seeds_never_change() -> None:
    # Runs that were stopped must resume with the numbers they began with, so these values are part of the format.
    assert derive() == 724655455495936113
    assert derive(0, "augment", "cnn", 7) == 5834180763726274193
    assert permutation(derive(0, "epoch", 0), 6).tolist() == [3, 4, 0, 2, 1, 5]
    assert uniforms(5, torch.tensor([3]), 2).tolist() == [[0.38410975267565683, 0.2636223738405704]]


@given(PARTS, PARTS)
def test_different_parts_give_different_seeds(one: list[int | str], other: list[int | str]) -> None:
    assert 0 <= derive(*one) < 2**63
    assert (derive(*one) == derive(*other)) == (one == other)


@pytest.mark.parametrize(
    ("one", "other"),
    [(("ab", "c"), ("a", "bc")), ((1, 23), (12, 3)), ((1,), ("1",)), (("",), ()), ((-1,), (1,)), (("i1",), (1,))],
)
def test_parts_that_look_alike_are_told_apart(one: tuple[int | str, ...], other: tuple[int | str, ...]) -> None:
    assert derive(*one) != derive(*other)


@given(SEEDS, st.integers(0, 300))
def test_a_permutation_has_every_number_once(seed: int, size: int) -> None:
    order = permutation(seed, size)
    assert order.dtype is torch.int64
    assert sorted(order.tolist()) == list(range(size))
    assert torch.equal(order, permutation(seed, size))


def test_permutations_are_uniform() -> None:
    counts = torch.zeros(24)
    for seed in range(4800):
        a, b, c, _ = permutation(seed, 4).tolist()
        counts[a * 6 + (b - (b > a)) * 2 + (c - (c > a) - (c > b))] += 1
    assert ((counts - 200).square() / 200).sum() < 49.7  # χ² with 23 degrees of freedom: one in a thousand


@given(SEEDS, st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=6), st.integers(1, 4))
def test_a_draw_depends_on_its_own_sample_only(seed: int, ids: list[int], draws: int) -> None:
    together = uniforms(seed, torch.tensor(ids), draws)
    assert together.shape == (len(ids), draws)
    assert together.dtype is torch.float64
    for row, each in zip(together, ids, strict=True):
        assert torch.equal(row, uniforms(seed, torch.tensor([each]), draws + 2)[0, :draws])


def test_draws_are_uniform_and_independent() -> None:
    count = 20_000
    rows = [uniforms(derive(0, number), torch.arange(count), 3) for number in range(2)]
    values = torch.cat(rows, 1).numpy()  # draws, and seeds, side by side
    assert values.min() >= 0
    assert values.max() < 1
    for column in values.T:
        observed, _ = np.histogram(column, 100, (0, 1))
        assert (
            (observed - count / 100) ** 2 / (count / 100)
        ).sum() < 149  # χ², 99 degrees of freedom: one in a thousand
    correlation = np.corrcoef(np.concatenate([values, np.roll(values, 1, axis=0)], 1).T)  # neighbouring ids too
    assert np.abs(correlation - np.eye(12)).max() < 4 / count**0.5
